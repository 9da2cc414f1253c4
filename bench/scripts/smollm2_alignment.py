"""SmolLM2-135M-Instruct through SFT, DPO, perplexity, export, and transformers' generate.

    python -m bench.scripts.smollm2_alignment FOLDER [--steps 20] [--rows 2] [--max-len 256]
                                              [--tokens 4096] [--keep DIR]

FOLDER is the model as a Hugging Face folder; data come from the folder shared/data beside the
project (--data). The table has the held-out loss before and after each stage and the perplexity of
the first tokens of WikiText-2 (raw, test split, windows of 1024). The exit code is 1 where a loss
does not fall, perplexity grows by more than --tolerance, or the export fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROMPT = "Write a Python function that returns the sum of two numbers."


def fastlm(*arguments: str | Path) -> str:
    """A fastlm command in a process of its own; its output.

    It is printed first, so that it can be run by hand.
    """
    words = [str(a) for a in arguments]
    print(f"$ fastlm {shlex.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "fastlm", *words], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def excerpt(text: Path, model: Path, tokens: int, to: Path) -> Path:
    """The first so many tokens of a text, as a file."""
    from fastlm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    ids = tokenizer.encode(text.read_text("utf-8")[: 8 * tokens])[:tokens]
    to.write_text(tokenizer.decode(ids), encoding="utf-8")
    return to


def perplexity(model: Path, text: Path) -> float:
    found = json.loads(
        fastlm("eval", model, "--data", text, "--protocols", "window", "--device", "cpu", "--json")
    )
    score = found["results"][0]
    return math.exp(score["nats"] / score["tokens"])


def losses(run: Path) -> tuple[float, float]:
    """Held-out loss at the start and in the end."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    return held_out[0], held_out[-1]


def generated(folder: Path) -> str:
    """What transformers writes with the exported folder, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**ids, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2, help="rows per step")
    parser.add_argument(
        "--max-len", type=int, default=256, help="longest example; a row of pairs has twice as much"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of WikiText-2")
    parser.add_argument("--sft-lr", default="2e-5")
    parser.add_argument("--dpo-lr", default="5e-6")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.15,
        help="growth of perplexity from one stage to the next",
    )
    parser.add_argument(
        "--keep", type=Path, help="folder for the runs and the export (default: removed in the end)"
    )
    return parser.parse_args()


def main() -> int:
    args = options()
    with tempfile.TemporaryDirectory() as temporary:
        return stages(args, args.keep or Path(temporary))


def stages(args: argparse.Namespace, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    text = excerpt(
        args.data / "wikitext-2-raw-test.txt", args.model, args.tokens, folder / "text.txt"
    )
    table = [("start", None, None, perplexity(args.model, text), 0.0)]
    model = args.model
    for stage, data, row_len, lr in (
        ("sft", "code_alpaca_2k.jsonl", args.max_len, args.sft_lr),
        ("dpo", "alpaca_eval_pairs.jsonl", 2 * args.max_len, args.dpo_lr),
    ):
        started, run = time.perf_counter(), folder / stage
        rates = [f"--optim.{kind}lr={lr}" for kind in ("", "embedding-", "head-")]
        options = (
            f"--template tokenizer --steps {args.steps} --validate-every {args.steps} "
            f"--batch-rows {args.rows} --micro-batch-rows 1 --max-len {args.max_len} "
            f"--row-len {row_len} --held-out 0.01 --bad-rows skip --optim.warmup-steps 2 "
            f"--device cpu"
        )
        folders = ["--data", args.data / data, "--cache", folder / "cache", "--out", run]
        fastlm(stage, model, *folders, *options.split(), *rates)
        seconds = time.perf_counter() - started
        first, last = losses(run)
        model = run
        table.append((stage, first, last, perplexity(run, text), seconds))
    exported = folder / "exported"
    fastlm("export", model, "--to", exported, "--template", "tokenizer")
    answer = generated(exported)
    print(f"\n{'stage':8}{'held-out loss':>26}{'perplexity':>12}{'seconds':>9}")
    for stage, first, last, ppl, seconds in table:
        loss = f"{first:.4f} -> {last:.4f}" if first is not None else ""
        print(f"{stage:8}{loss:>26}{ppl:12.2f}{seconds:9.0f}")
    print(f"\n{PROMPT}\n-> {answer}")
    fell = all(last < first for _, first, last, *_ in table[1:])
    steady = all(
        after[3] <= before[3] * (1 + args.tolerance) for before, after in itertools.pairwise(table)
    )
    print(
        f"\nlosses fall: {fell}; "
        f"perplexity stays within {args.tolerance:.0%} of the stage before: {steady}; "
        f"transformers generates: {bool(answer.strip())}"
    )
    return 0 if fell and steady and answer.strip() else 1


if __name__ == "__main__":
    sys.exit(main())

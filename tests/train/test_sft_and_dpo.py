"""fastlm sft and fastlm dpo as a user runs them.

They learn, stop talking, resume bit for bit, and name every mistake.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastlm import checkpoint
from fastlm.cli import main
from fastlm.config import Sampling
from fastlm.data.examples.formats import Message
from fastlm.data.examples.load import load_instructions
from fastlm.data.examples.templates import render_prompt
from fastlm.inference.generation import generate
from fastlm.interop.open_model import chat_template, open_model
from fastlm.train import reference

WORDS = [
    a + b
    for a in ("ka", "lo", "mi", "nu", "pe", "ri", "so", "tu")
    for b in ("dan", "fel", "gor", "hin", "jup", "kez", "lam")
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def instructions(tmp_path_factory) -> Path:
    """50 tasks with answers of one to four words, which nothing but memory gives."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"{word}:", "completion": " " + " ".join(rng.choices(WORDS, k=1 + n % 4))}
        for n, word in enumerate(WORDS[:50])
    ]
    return write(tmp_path_factory.mktemp("data") / "instructions.jsonl", rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """200 pairs: the chosen answer repeats the prompt's word, the rejected one names another."""
    rng = random.Random(1)
    rows = []
    for _ in range(200):
        word, other = rng.sample(WORDS, 2)
        rows.append(
            {"prompt": f"say {word}:", "chosen": f" {word}", "rejected": f" {other} {other}"}
        )
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def start(tmp_path_factory, small_text, small_tokenizer) -> Path:
    """A model that has seen a little text."""
    run = tmp_path_factory.mktemp("start") / "run"
    arguments = [
        "--preset",
        "tiny",
        "--model.vocab-size",
        "384",
        "--tokenizer",
        str(small_tokenizer),
        "--data",
        str(small_text),
        "--cache",
        str(run.parent / "cache"),
        "--seq-len",
        "64",
        "--steps",
        "30",
        "--validate-every",
        "0",
        "--checkpoint-every",
        "0",
        "--device",
        "cpu",
        "--out",
        str(run),
        "--optim.warmup-steps",
        "3",
    ]
    assert main(["pretrain", *arguments]) == 0
    return run


def tune(stage: str, start: Path, data: Path, run: Path, *more: str) -> int:
    fixed = [
        "--data",
        str(data),
        "--max-len",
        "64",
        "--out",
        str(run),
        "--cache",
        str(run.parent / "cache"),
        "--device",
        "cpu",
    ]
    return main([stage, str(start), *fixed, *more])


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


FAST = (
    "--optim.lr",
    "0.003",
    "--optim.embedding-lr",
    "0.003",
    "--optim.head-lr",
    "0.003",
    "--optim.warmup-steps",
    "5",
)


@pytest.mark.slow
def test_fifty_instructions_are_learned_and_every_answer_ends_by_itself(
    start, instructions, tmp_path, capsys
):
    run = tmp_path / "run"
    more = [
        "--steps",
        "150",
        "--batch-rows",
        "8",
        "--held-out",
        "0",
        "--validate-every",
        "0",
        "--checkpoint-every",
        "0",
        *FAST,
    ]
    assert tune("sft", start, instructions, run, *more) == 0
    model, tokenizer = open_model(str(run), torch.device("cpu"))
    examples = load_instructions(str(instructions), tokenizer, 64, held_out=0.0).train
    assert len(examples) == 50
    prompts = [ids[: int(counted.argmax())].tolist() for ids, counted in examples]
    answers = generate(model, prompts, 64, Sampling(temperature=0))
    assert [
        p + a[: a.index(tokenizer.eos_id) + 1] for p, a in zip(prompts, answers, strict=True)
    ] == [ids.tolist() for ids, _ in examples]


@pytest.mark.slow
def test_preferences_of_200_pairs_carry_over_to_held_out_ones(start, pairs, tmp_path, capsys):
    run = tmp_path / "run"
    more = [
        "--steps",
        "60",
        "--batch-rows",
        "4",
        "--held-out",
        "0.2",
        "--validate-every",
        "30",
        "--beta",
        "0.1",
        *FAST[:1],
        "0.001",
    ]
    assert tune("dpo", start, pairs, run, *more) == 0
    first, *_, last = [r for r in rows(run) if "validation_loss" in r]
    assert first["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["validation_rewards/accuracies"] == 0.5  # all rewards are 0: every pair is a tie
    assert last["validation_rewards/accuracies"] > 0.8
    assert last["validation_loss"] < 0.5
    assert last["validation_rewards/margins"] == pytest.approx(
        last["validation_rewards/chosen"] - last["validation_rewards/rejected"], abs=1e-4
    )
    assert last["validation_kl"] > 0
    assert "Held-out pairs" in capsys.readouterr().out


def test_a_run_notes_the_template_it_was_taught(start, instructions, tmp_path):
    alpaca = write(
        tmp_path / "alpaca.jsonl", [{"instruction": f"Name {w}.", "output": w} for w in WORDS]
    )
    heading = "### Instruction:\nhello\n\n### Response:"
    for data, template, prompt in ((instructions, "none", "hello"), (alpaca, "alpaca", heading)):
        run = tmp_path / template
        assert (
            tune(
                "sft",
                start,
                data,
                run,
                "--steps",
                "1",
                "--batch-rows",
                "1",
                "--validate-every",
                "0",
            )
            == 0
        )
        tokenizer = open_model(str(run), torch.device("cpu"))[1]
        assert chat_template(str(run), tokenizer) == template
        rendered = render_prompt([Message("user", "hello")], tokenizer, template)
        assert prompt in rendered
        assert (rendered == prompt) == (template == "none")


@pytest.mark.parametrize("share", [True, False])
def test_the_first_step_of_dpo_is_ln_2_and_moves_the_model(share, start, pairs, tmp_path):
    more = [
        "--steps",
        "2",
        "--batch-rows",
        "2",
        "--micro-batch-rows",
        "1",
        *([] if share else ["--no-share-prompt"]),
    ]
    assert tune("dpo", start, pairs, tmp_path / "run", *more) == 0
    first, second = (r for r in rows(tmp_path / "run") if "loss" in r)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert first["grad_norm"] > 0
    assert abs(second["rewards/margins"]) > 0


def test_reference_logprobs_are_computed_once(start, pairs, tmp_path, monkeypatch):
    written, write = [], reference.write_kept
    monkeypatch.setattr(
        reference, "write_kept", lambda file, array: (written.append(file), write(file, array))
    )
    for run, steps in (("a", "2"), ("b", "2"), ("c", "4")):
        assert tune("dpo", start, pairs, tmp_path / run, "--steps", steps, "--batch-rows", "1") == 0
    assert len(written) == 3, (
        "training and held-out rows, and the rows that only the third run uses"
    )
    assert [r["loss"] for r in rows(tmp_path / "a") if "loss" in r] == [
        r["loss"] for r in rows(tmp_path / "b") if "loss" in r
    ]
    whole = {file: file.read_bytes() for file in written}
    for n, file in enumerate(
        whole
    ):  # a flipped bit, or a file cut short: made again, to the same bits
        file.write_bytes(whole[file][:-1] if n else bytes([whole[file][0] ^ 1]) + whole[file][1:])
    written.clear()
    assert tune("dpo", start, pairs, tmp_path / "d", "--steps", "4", "--batch-rows", "1") == 0
    assert sorted(set(written)) == sorted(whole)
    assert {file: file.read_bytes() for file in whole} == whole


@pytest.mark.parametrize("loss", ["ipo", "length-normalised", "simpo"])
def test_every_variant_trains(loss, start, pairs, tmp_path):
    more = ["--loss", loss, "--steps", "8", "--batch-rows", "2", "--validate-every", "0", *FAST]
    assert tune("dpo", start, pairs, tmp_path / "run", *more) == 0
    first, *_, last = [r["loss"] for r in rows(tmp_path / "run") if "loss" in r]
    if loss == "ipo":
        assert first == pytest.approx(25.0, abs=1e-3)  # (0 - 1 / (2 * 0.1))^2
    if loss == "length-normalised":
        assert first == pytest.approx(math.log(2), abs=1e-6)
    assert last < first
    assert bool(list((tmp_path / "cache").glob("reference-*"))) == (loss != "simpo")


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_that_stopped_goes_on_bit_for_bit(stage, start, instructions, pairs, tmp_path):
    data = {"sft": instructions, "dpo": pairs}[stage]
    more = ["--batch-rows", "2", "--validate-every", "3", "--checkpoint-every", "2", *FAST]
    assert tune(stage, start, data, tmp_path / "whole", "--steps", "6", *more) == 0
    assert tune(stage, start, data, tmp_path / "part", "--steps", "6", *more) == 0
    for folder in list((tmp_path / "part" / "checkpoints").iterdir()):
        if folder.name != "step-000004":
            shutil.rmtree(folder)
    assert main([stage, "--resume", str(tmp_path / "part")]) == 0
    a, b = (
        load_file(checkpoint.locate(tmp_path / r) / "model.safetensors") for r in ("whole", "part")
    )
    assert all(a[k].equal(b[k]) for k in a)
    assert [r.get("loss") for r in rows(tmp_path / "whole")] == [
        r.get("loss") for r in rows(tmp_path / "part")
    ]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_losses_do_not_depend_on_micro_batches(stage, start, instructions, pairs, tmp_path):
    data = {"sft": instructions, "dpo": pairs}[stage]
    for n in ("4", "1"):
        more = [
            "--steps",
            "4",
            "--batch-rows",
            "4",
            "--micro-batch-rows",
            n,
            "--validate-every",
            "0",
        ]
        assert tune(stage, start, data, tmp_path / n, *more) == 0
    a, b = ([r["loss"] for r in rows(tmp_path / n) if "loss" in r] for n in ("4", "1"))
    assert a == pytest.approx(b, rel=1e-5)


MISTAKES = {
    "no model": (["sft"], "sft needs MODEL"),
    "no data": (["sft", "START"], "sft needs --data"),
    "missing model": (["sft", "no/such/run", "--data", "DATA"], "no/such/run does not exist"),
    "missing data": (["dpo", "START", "--data", "no/such.jsonl"], "no/such.jsonl"),
    "not pairs": (["dpo", "START", "--data", "DATA"], "no field 'chosen'"),
    "too long": (["sft", "START", "--data", "DATA", "--max-len", "100000"], "pass --max-len 256"),
    "row": (["sft", "START", "--data", "DATA", "--row-len", "10"], "row_len is 10"),
    "beta": (["dpo", "START", "--data", "DATA", "--beta", "0"], "beta is 0"),
    "smoothing": (
        ["dpo", "START", "--data", "DATA", "--loss", "ipo", "--label-smoothing", "0.1"],
        "label_smoothing goes with",
    ),
    "loss": (["dpo", "START", "--data", "DATA", "--loss", "simp"], "did you mean simpo?"),
    "template": (["sft", "START", "--data", "DATA", "--template", "nope"], "chat template 'nope'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    name, start, instructions, tmp_path, mistake
):
    arguments, words = MISTAKES[name]
    arguments = [{"START": str(start), "DATA": str(instructions)}.get(a, a) for a in arguments]
    fixed = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    assert words in mistake([*arguments, *fixed])
    assert not (tmp_path / "run").exists()


def test_another_start_is_not_mistaken_for_the_one_of_the_run(
    start, instructions, tmp_path, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(start, copy)
    assert (
        tune("sft", copy, instructions, tmp_path / "run", "--steps", "2", "--batch-rows", "1") == 0
    )
    assert main(["pretrain", "--resume", str(copy), "--steps", "32"]) == 0
    assert main(["sft", "--resume", str(tmp_path / "run"), "--steps", "4"]) == 2
    assert "what the run started from has changed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_compiled_and_eager_runs_agree(stage, start, instructions, pairs, tmp_path):
    data = {"sft": instructions, "dpo": pairs}[stage]
    for mode in ("eager", "compile"):
        more = [
            "--steps",
            "3",
            "--batch-rows",
            "2",
            "--validate-every",
            "0",
            *(["--compile"] if mode == "compile" else []),
        ]
        assert tune(stage, start, data, tmp_path / mode, *more, *FAST) == 0
    a, b = (
        [r["loss"] for r in rows(tmp_path / mode) if "loss" in r] for mode in ("eager", "compile")
    )
    assert a == pytest.approx(b, rel=1e-4)

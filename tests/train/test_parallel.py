"""Training in two processes under torchrun (CPU, gloo) is training in one.

Same losses, same weights, same files.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import numpy as np
import pytest
import torch

from fastlm import checkpoint
from fastlm.cli import main
from fastlm.config import PretrainConfig
from fastlm.data.examples.load import load_instructions, pack_examples
from fastlm.data.examples.packing import packed_batch
from fastlm.errors import UserError
from fastlm.interop.open_model import open_model
from fastlm.train import parallel

HERE = Path(__file__).parent
STAGES = ("pretrain", "shortlist", "sft", "dpo")


def start(*command: str) -> subprocess.Popen[str]:
    """The command in two processes of one thread each, on a port of their own."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.Popen(
        [*launcher, *command],
        env=environment,
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(*command: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """The command to its end, which is a good one unless told otherwise."""
    process = start(*command)
    try:
        out, error = process.communicate(timeout=240)
    finally:
        process.terminate()  # and torchrun its own
    assert not ok or process.returncode == 0, error
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path) -> list[dict]:
    """The lines without what depends on the clock and the machine."""
    clock = ("seconds", "tokens_per_s", "share_of_peak", "peak_gib")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    model = checkpoint.load_model(checkpoint.locate(run), torch.device("cpu"))[0]
    return {name: p.detach() for name, p in model.named_parameters()}


def same(one: Path, other: Path) -> None:
    """The same losses, figures and weights, bit for bit.

    Validations, in other batches, to the rounding of fp32.
    """
    a, b = figures(one), figures(other)
    assert len(a) == 6 + 3
    assert [row for row in a if "loss" in row] == [row for row in b if "loss" in row]
    for x, y in zip(a, b, strict=True):
        assert y == pytest.approx(x, rel=1e-6)
    old, new = weights(one), weights(other)
    assert [name for name in old if not old[name].equal(new[name])] == []


def stopped_after_step_3(run: Path, to: Path) -> Path:
    """The run as if it had been killed between its two checkpoints."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step-000006")
    return to


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Answers of one token beside answers of a whole row, and pairs."""
    folder = tmp_path_factory.mktemp("data")
    long = " ".join(f"word{n}" for n in range(12))
    instructions = [
        {"prompt": f"{long} {n}:", "completion": " a"}
        if n % 2
        else {"prompt": "b:", "completion": f" {n} {long}"}
        for n in range(60)
    ]
    pairs = [
        {
            "prompt": f"say {n}:",
            "chosen": f" {n}" * (1 + n % 5),
            "rejected": f" {n + 1} {long[: n % 40]}",
        }
        for n in range(60)
    ]
    found = {}
    for name, lines in {"sft": instructions, "dpo": pairs}.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_text, small_tokenizer, data) -> Path:
    """ONE/STAGE by one process, TWO/STAGE and SHARDED/STAGE by two, and resumed-WAY/STAGE begun by
    one and ended by two.
    """
    folder = tmp_path_factory.mktemp("runs")
    common = [
        "--steps",
        "6",
        "--batch-rows",
        "4",
        "--micro-batch-rows",
        "2",
        "--device",
        "cpu",
        "--validate-every",
        "3",
        "--checkpoint-every",
        "3",
    ]
    text = [
        "--preset",
        "tiny",
        "--model.vocab-size",
        "384",
        "--tokenizer",
        str(small_tokenizer),
        "--data",
        str(small_text),
        "--seq-len",
        "32",
        "--optim.warmup-steps",
        "2",
        "--validation-tokens",
        "500",
        "--isolate-documents",
    ]

    def command(stage: str, name: str) -> list[str]:
        out = [
            "--out",
            str(folder / name / stage),
            "--cache",
            str(folder / name / "cache"),
            *common,
        ]
        if name == "sharded":
            out += ["--parallel", "fsdp"]
        if stage in ("sft", "dpo"):
            return [
                stage,
                str(folder / "one/pretrain"),
                "--data",
                str(data[stage]),
                "--max-len",
                "64",
                "--row-len",
                "64",
                "--optim.lr",
                "0.003",
                "--optim.embedding-lr",
                "0.003",
                "--optim.warmup-steps",
                "2",
                *out,
            ]
        return ["pretrain", *text, *(["--shortlist", "100"] if stage == "shortlist" else []), *out]

    for stage in STAGES:
        assert main(command(stage, "one")) == 0
    commands = [command(stage, name) for name in ("two", "sharded") for stage in STAGES]
    for stage in ("pretrain", "dpo"):
        for way in ("ddp", "fsdp"):
            resumed = stopped_after_step_3(
                folder / "one" / stage, folder / f"resumed-{way}" / stage
            )
            commands.append([stage, "--resume", str(resumed), "--parallel", way])
    (folder / "commands.json").write_text(json.dumps(commands))
    done = torchrun(str(HERE / "each_process.py"), str(folder / "commands.json"))
    (folder / "output.txt").write_text(done.stdout)
    return folder


def close(one: Path, other: Path) -> None:
    """The same losses, figures and weights to 1e-5."""
    a, b = figures(one), figures(other)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert y == pytest.approx(x, rel=1e-5, abs=1e-6)
    old, new = weights(one), weights(other)
    for name in old:
        torch.testing.assert_close(new[name], old[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_with_half_the_model_each_take_the_steps_of_one(stage, runs):
    close(runs / "one" / stage, runs / "sharded" / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_take_the_steps_of_one(stage, runs):
    """Each has one of a step's two micro-batches, and a sum of two does not depend on their order:
    every bit is the same.
    """
    same(runs / "one" / stage, runs / "two" / stage)


def test_the_processes_of_sft_count_very_different_numbers_of_targets(runs, data):
    """Without which a mean of the processes' means would pass the test above."""
    tokenizer = open_model(str(runs / "one/pretrain"), torch.device("cpu"))[1]
    examples = load_instructions(str(data["sft"]), tokenizer, 64)
    packed = pack_examples(examples, 64, 1, False)[0]
    counts = [
        [packed_batch(packed, start + part, 2, 0).counted for part in (0, 2)]
        for start in range(0, 24, 4)
    ]
    assert any(max(pair) > 2 * min(pair) for pair in counts), counts


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_a_run_begun_by_one_process_goes_on_with_two_and_the_other_way_round(stage, runs, tmp_path):
    same(runs / "one" / stage, runs / "resumed-ddp" / stage)
    close(runs / "one" / stage, runs / "resumed-fsdp" / stage)
    cache = shutil.copytree(runs / "two/cache", tmp_path / "cache")
    for name, alike in (("two", same), ("sharded", close)):
        back = stopped_after_step_3(runs / name / stage, tmp_path / name)
        assert main([stage, "--resume", str(back), "--cache", str(cache)]) == 0
        alike(runs / "one" / stage, back)
        assert checkpoint.read_state(checkpoint.locate(back))["position"] == 24


def test_only_the_first_process_prints_and_writes(runs):
    text = (runs / "output.txt").read_text()
    assert text.count("Checkpoint: ") == 2 * len(STAGES) + 4
    assert "parameters on 2 x cpu" in text
    for stage in STAGES:
        found = ((runs / n / stage).rglob("*") for n in ("one", "two"))
        one, two = (
            {p.name for p in paths if not p.name.endswith(".safetensors")} for paths in found
        )
        assert one | {".launch", ".shared"} == two
    one, two = (sorted(p.name for p in (runs / n / "cache").glob("*")) for n in ("one", "two"))
    assert one == two


def test_the_reference_of_dpo_is_computed_in_shares_and_whole_in_its_file(runs):
    one, two = (sorted((runs / n / "cache").glob("reference-*")) for n in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        numbers = (
            np.frombuffer(file.read_bytes()[32:], "<f4") for file in (a, b)
        )  # behind the digest
        np.testing.assert_array_equal(*numbers)  # where NaN, in both
    text = (runs / "output.txt").read_text()
    computed = [
        int(line.split(",")[1].split()[0])
        for line in text.splitlines()
        if line.startswith("Reference: ")
    ]
    assert computed == [12, 1] * 2 + [0] * 4, (
        "each batch by one of the two; the run that went on has the reference of its beginning"
    )


def test_rows_that_the_processes_cannot_share_are_one_line_and_exit_code_2(small_run, tmp_path):
    done = torchrun(
        "-m",
        "fastlm",
        "pretrain",
        *small_run,
        "--batch-rows",
        "7",
        "--out",
        str(tmp_path / "run"),
        ok=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastlm: ")]
    assert lines == [
        "fastlm: batch_rows is 7, not a multiple of torchrun's 2 processes; "
        "change --batch-rows, or start 1 or 7 of them"
    ]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_one_process_is_its_line_alone(tmp_path):
    done = torchrun(str(HERE / "failing_process.py"), ok=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("fastlm: ")]
    assert told == ["fastlm: only the second process knows"]
    assert done.stderr.count("Traceback") <= 1, done.stderr  # torchrun's own


def test_micro_batches_are_of_each_process(monkeypatch):
    monkeypatch.setattr(parallel, "ranks", lambda: (0, 4))
    assert parallel.micro_rows(PretrainConfig(batch_rows=32)) == 8
    assert parallel.micro_rows(PretrainConfig(batch_rows=32, micro_batch_rows=4)) == 4
    assert parallel.micro_rows(PretrainConfig(batch_rows=32, micro_batch_rows=16)) == 8
    with pytest.raises(UserError, match="micro_batch_rows is 4, which does not divide the 6 rows"):
        parallel.micro_rows(PretrainConfig(batch_rows=24, micro_batch_rows=4))


@pytest.mark.slow
def test_a_signal_stops_both_after_the_same_step_with_a_checkpoint(small_run, tmp_path):
    run = tmp_path / "run"
    endless = [
        "--steps",
        "100000",
        "--checkpoint-every",
        "0",
        "--validate-every",
        "0",
        "--out",
        str(run),
    ]
    process = start("-m", "fastlm", "pretrain", *small_run, *endless)
    end = time.monotonic() + 120
    try:
        while not (
            (run / "metrics.jsonl").is_file()
            and (run / "metrics.jsonl").read_text().count('"loss"') >= 3
        ):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    assert out.count("Stopped by SIGTERM after step") == 1
    assert out.count(f"fastlm pretrain --resume {run}") == 1
    assert checkpoint.read_state(checkpoint.locate(run))["step"] == rows(run)[-1]["step"]
    assert "fastlm: " not in error


@pytest.mark.slow
def test_two_compiled_processes_agree_with_one_that_is_not(small_run, tmp_path):
    common = [*small_run, "--steps", "4", "--validate-every", "0"]
    assert main(["pretrain", *common, "--out", str(tmp_path / "one")]) == 0
    torchrun("-m", "fastlm", "pretrain", *common, "--compile", "--out", str(tmp_path / "two"))
    one, two = (
        [row["loss"] for row in rows(tmp_path / n) if "loss" in row] for n in ("one", "two")
    )
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_group_and_the_run_ends_as_if_nothing_had_been(
    way, small_run, tmp_path
):
    """tests/train/kills.py does the same as often as one likes."""
    options = [
        *small_run,
        "--steps",
        "100",
        "--validate-every",
        "0",
        "--checkpoint-every",
        "2",
        "--parallel",
        way,
    ]
    assert (
        kills.torchrun(
            [*options, "--out", str(tmp_path / "undisturbed")], 0, tmp_path / "log"
        ).wait(240)
        == 0
    )
    (seconds,) = kills.kill_at_random(options, tmp_path / "killed", 1, tmp_path / "log")
    assert seconds < 60
    assert (tmp_path / "log").read_text().count(
        "fastlm: "
    ) <= 1  # none where the kill met a process that was ending
    old, new = weights(tmp_path / "undisturbed"), weights(tmp_path / "killed")
    assert [name for name in old if not old[name].equal(new[name])] == []


@pytest.mark.slow
def test_a_process_that_keeps_the_others_waiting_is_named(tmp_path):
    done = torchrun(str(HERE / "hanging_process.py"), ok=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("fastlm: ")]
    assert told == [
        "fastlm: waited 0.1 minutes (--timeout-minutes) for process 1, which reads the rows of "
        "step 7; "
        "go on with --resume, or have torchrun do it: --max-restarts"
    ]

"""fastlm pretrain as a user runs it.

It learns, resumes bit for bit after a kill, stops cleanly, and names every mistake.
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

import pytest
from safetensors.torch import load_file

from fastlm import checkpoint, files
from fastlm.cli import main


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in rows(run) if "loss" in r}


def weights(run: Path) -> bytes:
    return (checkpoint.locate(run) / "model.safetensors").read_bytes()


def without(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()} if path.exists() else set()


def start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastlm", "pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count(
            '"loss"'
        ) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come")


def test_a_run_learns_records_and_ends_with_what_to_do_next(small_run, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        main(
            [
                "pretrain",
                *small_run,
                "--steps",
                "40",
                "--optim.warmup-steps",
                "5",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    seen = losses(run)
    assert sorted(seen) == list(range(1, 41))
    assert seen[1] == pytest.approx(5.95, abs=0.1)  # ln 384: a fresh model is uniform
    validations = [r["validation_loss"] for r in rows(run) if "validation_loss" in r]
    assert validations == sorted(validations, reverse=True)
    assert validations[-1] < 4.6  # ln 119 = 4.78 by counting single tokens
    assert {
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "share_of_peak",
        "peak_gib",
        "seconds",
    } <= rows(run)[1].keys()
    text = capsys.readouterr().out
    for words in (
        "every slot real",
        "before training, ",
        "by counting single tokens",
        "Sample",
        "Checkpoint:",
        f"fastlm generate {run}",
        f"fastlm pretrain --resume {run} --steps 80",
    ):
        assert words in text
    assert main(["generate", str(run), "--prompt", "def ", "--tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(small_run, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert (
            main(
                [
                    "pretrain",
                    *small_run,
                    "--steps",
                    "4",
                    "--seed",
                    seed,
                    "--out",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_run_on_a_cpu_that_does_not_compile_imports_neither_triton_nor_dynamo(
    small_run, tmp_path
):
    """They take 66 and 76 MiB, and Dynamo 2.3 s."""
    arguments = [
        "pretrain",
        *small_run,
        "--steps",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    heavy = "{'triton', 'torch._dynamo'}"
    code = "import sys; from fastlm.cli import main; main(sys.argv[1:])"
    code += f"; print({heavy} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_kill_9_between_checkpoints_and_resume_is_bit_identical(small_run, tmp_path):
    common = [*small_run, "--steps", "40", "--checkpoint-every", "10", "--validate-every", "15"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = start([*common, "--out", str(whole)])
    assert done.wait(120) == 0, done.communicate()[0]
    process = start([*common, "--out", str(killed)])
    wait_for_step(killed, 17, process)
    process.kill()
    process.wait()
    assert not (killed / "checkpoints" / "step-000040").exists()
    again = start(["--resume", str(killed)])
    assert again.wait(120) == 0, again.communicate()[0]
    assert losses(killed) == losses(whole)
    assert sorted(losses(killed)) == list(range(1, 41))
    assert weights(killed) == weights(whole)
    a, b = (load_file(checkpoint.locate(r) / "optimizer.safetensors") for r in (whole, killed))
    assert a.keys() == b.keys()
    assert all(a[k].equal(b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(small_run, tmp_path, number):
    run = tmp_path / "run"
    options = "--steps 5000 --checkpoint-every 0 --validate-every 0"
    process = start([*small_run, *options.split(), "--out", str(run)])
    wait_for_step(run, 3, process)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert f"fastlm pretrain --resume {run}" in text
    assert "Traceback" not in text
    step = checkpoint.read_state(checkpoint.locate(run))["step"]
    assert step == max(losses(run))
    assert main(["pretrain", "--resume", str(run), "--steps", str(step + 2)]) == 0
    assert sorted(losses(run)) == list(range(1, step + 3))


MISTAKES = {
    "missing file": (["--data", "no/such/file.txt"], "no/such/file.txt"),
    "longer than the text": (
        ["--seq-len", "200000", "--model.max-seq-len", "200000"],
        "one row needs 200,001",
    ),
    "vocabulary too small": (["--model.vocab-size", "100"], "pass --model.vocab-size 384"),
    "unknown preset": (["--preset", "tyni"], "did you mean tiny"),
    "no such tokenizer": (["--tokenizer", "no/such/tokenizer.json"], "no/such/tokenizer.json"),
    "heads": (["--model.n-heads", "3"], "does not divide"),
    "no GPU": (["--device", "cuda"], "PyTorch sees no GPU"),
    "no such order": (
        ["--deterministic", "--attention", "flash"],
        "attention flash is not deterministic",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(name, small_run, tmp_path, mistake):
    if name == "no GPU":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    extra, words = MISTAKES[name]
    assert (
        words.lower()
        in mistake(["pretrain", *small_run, *extra, "--out", str(tmp_path / "run")]).lower()
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty"),
        ("short.txt", b"just a few words", "12 tokens; expected at least"),
        ("bytes.txt", b"\xff\xfe broken \xff" * 100, "utf-8"),
        ("folder", None, "no .txt"),
    ],
)
def test_unusable_text_is_one_line_and_leaves_nothing_behind(
    name, content, words, small_run, tmp_path, mistake
):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    error = mistake(["pretrain", *small_run, "--data", str(path), "--out", str(tmp_path / "run")])
    assert name in error
    assert words in error.lower(), error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_untouched(small_run, tmp_path, capsys, mistake):
    run = tmp_path / "run"
    assert main(["pretrain", *small_run, "--steps", "2", "--out", str(run)]) == 0
    before, listing = weights(run), without(run)
    capsys.readouterr()
    assert "may hold another run" in mistake(["pretrain", *small_run, "--out", str(run)])
    assert (weights(run), without(run)) == (before, listing)


def test_damaged_shards_and_checkpoints_are_named(small_run, tmp_path, capsys, mistake):
    run = tmp_path / "run"
    assert main(["pretrain", *small_run, "--steps", "4", "--out", str(run)]) == 0
    capsys.readouterr()
    assert "has done its 4 steps" in mistake(["pretrain", "--resume", str(run)])
    weights_file = checkpoint.locate(run) / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-7])
    assert "has no whole checkpoint; start a new run" in mistake(
        ["pretrain", "--resume", str(run), "--steps", "8"]
    )
    shard = next((tmp_path / "cache").rglob("train-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert shard.name in mistake(["pretrain", *small_run, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(small_run, tmp_path, capsys):
    """One line says so, and the weights are those of the run that was not disturbed."""
    for name in ("undisturbed", "damaged"):
        more = ["--steps", "6", "--checkpoint-every", "2", "--out", str(tmp_path / name)]
        assert main(["pretrain", *small_run, *more]) == 0
    newest = checkpoint.locate(tmp_path / "damaged")
    (newest / "optimizer.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(tmp_path / "damaged")]) == 0
    assert f"Passed over: {newest}/optimizer.safetensors is damaged" in capsys.readouterr().out
    a, b = (
        checkpoint.locate(tmp_path / name) / "model.safetensors"
        for name in ("undisturbed", "damaged")
    )
    assert a.read_bytes() == b.read_bytes()


def test_changed_text_is_not_mistaken_for_the_text_of_the_run(
    small_run, small_text, tmp_path, mistake
):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(small_text.read_text())
    assert (
        main(["pretrain", *small_run, "--data", str(text), "--steps", "4", "--out", str(run)]) == 0
    )
    text.write_text(small_text.read_text() * 2)
    assert "has changed since" in mistake(["pretrain", "--resume", str(run), "--steps", "8"])


def test_divergence_stops_the_run_with_advice(small_run, tmp_path, mistake):
    diverging = [
        "--optim.lr",
        "1e30",
        "--optim.embedding-lr",
        "1e30",
        "--optim.clip-norm",
        "0",
        "--steps",
        "30",
    ]
    error = mistake(["pretrain", *small_run, *diverging, "--out", str(tmp_path / "run")])
    assert "training has diverged; lower --optim.lr" in error


def test_a_full_disk_is_one_line(small_run, tmp_path, mistake, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    assert "the disk is full" in mistake(["pretrain", *small_run, "--out", str(tmp_path / "run")])


def test_tensorboard_events_are_written(small_run, tmp_path):
    pytest.importorskip("tensorboard")
    assert (
        main(
            [
                "pretrain",
                *small_run,
                "--steps",
                "3",
                "--tensorboard",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        list(losses(tmp_path / "run").values()), rel=1e-6
    )


@pytest.mark.slow
def test_compiled_and_eager_runs_agree(small_run, tmp_path):
    for name, extra in (("eager", []), ("compiled", ["--compile"])):
        assert (
            main(["pretrain", *small_run, "--steps", "6", *extra, "--out", str(tmp_path / name)])
            == 0
        )
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert list(compiled.values()) == pytest.approx(list(eager.values()), rel=1e-4)


def test_a_shortlist_learns_what_the_whole_softmax_learns_and_resumes_bit_for_bit(
    small_run, tmp_path
):
    options = "--steps 40 --batch-rows 4 --checkpoint-every 25 --validate-every 0"
    common = [*small_run, *options.split()]
    for name, extra in (("whole", []), ("short", ["--shortlist", "100"])):
        assert main(["pretrain", *common, *extra, "--out", str(tmp_path / name)]) == 0
    whole, short = (
        next(r["validation_loss"] for r in rows(tmp_path / n) if "validation_loss" in r)
        for n in ("whole", "short")
    )
    assert short == pytest.approx(whole, abs=0.2)  # the whole vocabulary in both validations
    before = losses(tmp_path / "short")
    assert main(["pretrain", *common, "--shortlist", "100", "--out", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again") == before
    last = tmp_path / "short" / "checkpoints" / "step-000040"
    expected = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    assert main(["pretrain", "--resume", str(tmp_path / "short")]) == 0
    assert losses(tmp_path / "short") == before
    assert (last / "model.safetensors").read_bytes() == expected


def test_isolated_documents_train_the_same_whatever_the_micro_batches(
    small_run, small_text, tmp_path
):
    words = small_text.read_text(encoding="utf-8").split()
    texts = [" ".join(words[i : i + 9]) for i in range(0, 4000, 9)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    common = [
        *small_run,
        "--data",
        str(data),
        "--steps",
        "4",
        "--validate-every",
        "0",
        "--isolate-documents",
    ]
    for name, extra in (
        ("whole", []),
        ("parts", ["--micro-batch-rows", "2"]),
        ("short", ["--shortlist", "64"]),
    ):
        assert main(["pretrain", *common, *extra, "--out", str(tmp_path / name)]) == 0
    whole, parts, short = (losses(tmp_path / name) for name in ("whole", "parts", "short"))
    assert list(short.values()) == pytest.approx(
        list(whole.values()), rel=0.1
    )  # estimates of the same losses
    assert list(whole.values()) == pytest.approx(list(parts.values()), rel=1e-5)
    assert main(["pretrain", *common[:-1], "--out", str(tmp_path / "joined")]) == 0
    assert losses(tmp_path / "joined") != whole


def test_tokens_of_each_source_of_a_mixture_are_logged(small_run, small_text, tmp_path):
    half = len(small_text.read_text(encoding="utf-8")) // 2
    for name, part in (("a", slice(0, half)), ("b", slice(half, None))):
        (tmp_path / f"{name}.txt").write_text(
            small_text.read_text(encoding="utf-8")[part], encoding="utf-8"
        )
    data = f"{tmp_path}/a.txt:3, {tmp_path}/b.txt:1"
    assert (
        main(
            ["pretrain", *small_run, "--data", data, "--steps", "8", "--out", str(tmp_path / "run")]
        )
        == 0
    )
    counts = [r["tokens_by_source"] for r in rows(tmp_path / "run") if "loss" in r]
    assert [sum(c.values()) for c in counts] == [256 * n for n in range(1, 9)]
    first, second = counts[-1].values()
    assert first / second == pytest.approx(3, rel=0.15)


def test_bad_rows_stop_the_run_or_are_skipped(small_run, small_text, tmp_path, mistake):
    data = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"text": part}) for part in small_text.read_text(encoding="utf-8").split("\n\n")
    ]
    data.write_text("\n".join([*lines[:3], "{broken", *lines[3:]]), encoding="utf-8")
    assert "rows.jsonl:4" in mistake(
        ["pretrain", *small_run, "--data", str(data), "--out", str(tmp_path / "run")]
    )
    assert (
        main(
            [
                "pretrain",
                *small_run,
                "--data",
                str(data),
                "--bad-rows",
                "skip",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )

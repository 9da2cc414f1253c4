"""A training step on the CPU against Hugging Face Llama and the matmul bound, the head's loss, and the start-up time."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from measure import ratio

ROOT = Path(__file__).parents[1]


def seconds(turns: list[dict]) -> list[float]:
    return [turn["seconds"] for turn in turns]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_cpu_training_step(mode, contender, measuring, report, benchmark):
    """30M parameters, batch 8 x 256, fp32: tokens/s, against Hugging Face, against the matmuls alone, and the memory."""
    pytest.importorskip("transformers")
    from contenders import SHAPE

    from fastlm.config import ModelConfig
    from fastlm.model import training_flops_per_token

    players = {name: contender(name) for name in (f"ours {mode}", f"hugging face {mode}", "matmul")}
    ours, theirs, bound = players.values()
    for player in players.values():  # compiles, fills caches
        player()
    turns: dict[str, list[dict]] = {name: [] for name in players}
    for _ in range(3 if measuring else 1):
        turns["matmul"].append(min((bound() for _ in range(2)), key=lambda turn: turn["seconds"]))
        turns[f"hugging face {mode}"].append(theirs())
        turns[f"ours {mode}"].append(benchmark.pedantic(ours) if len(turns["matmul"]) == 1 else ours())
    if not measuring:
        return
    vocab, dim, layers, heads, ffn, batch, length = SHAPE["full"]
    config = ModelConfig(vocab_size=vocab, dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads, ffn_dim=ffn)
    step_flops = training_flops_per_token(config, length) * batch * length
    mine, hf, mm = (seconds(turns[name]) for name in (f"ours {mode}", f"hugging face {mode}", "matmul"))
    report(
        tokens_per_second=batch * length / statistics.median(mine),
        times_hugging_face=ratio(hf, mine),
        share_of_matmul_bound=ratio([step_flops * s / (2 * 2048**3) for s in mm], mine),
        matmul_gflops=2 * 2048**3 / statistics.median(mm) / 1e9,
        peak_gib=turns[f"ours {mode}"][-1]["peak_gib"],
        hugging_face_peak_gib=turns[f"hugging face {mode}"][-1]["peak_gib"],
    )


def test_cpu_linear_cross_entropy(contender, measuring, report, benchmark):
    """N = 4096, D = 384, V = 50257, forward and backward: against torch's own, against matmul + cross_entropy; memory."""
    players = {name: contender(name) for name in ("our head", "torch head", "plain head")}
    turns: dict[str, list[dict]] = {name: [] for name in players}
    for round_ in range(2 if measuring else 1):
        for name, player in players.items():
            turns[name].append(benchmark.pedantic(player) if name == "our head" and round_ == 0 else player())
    if not measuring:
        return
    ours = seconds(turns["our head"])
    extra = {name: (turns[name][-1]["peak_gib"] - players[name].ready["peak_gib"]) * 1024 for name in players}
    report(
        seconds=statistics.median(ours),
        times_torch=ratio(seconds(turns["torch head"]), ours),
        times_plain=ratio(seconds(turns["plain head"]), ours),
        extra_mib=extra["our head"],
        torch_extra_mib=extra["torch head"],
        plain_extra_mib=extra["plain head"],
    )


def test_cpu_start_up(measuring, report, benchmark, tmp_path):
    """`fastlm --help`, and an eager run of one small step from the command to its end, tokenising included."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4000, encoding="utf-8")
    run = ["pretrain", "--preset", "tiny", "--steps", "1", "--data", str(text), "--seq-len", "64", "--batch-rows", "4",
           "--device", "cpu", "--cache", str(tmp_path / "cache")]  # fmt: skip

    def timed(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fastlm", *arguments], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start

    helps = [benchmark.pedantic(timed, args=("--help",))] + [timed("--help") for _ in range(4 if measuring else 0)]
    first = [timed(*run, "--out", str(tmp_path / f"run{i}")) for i in range(2 if measuring else 1)]
    if measuring:
        report(help_seconds=statistics.median(helps), one_step_run_seconds=min(first))

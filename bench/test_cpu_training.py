"""A training step on the CPU against Hugging Face Llama; the head's loss; the start-up time."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.harness.contender import each, rounds_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_cpu_training_step(mode, contender, measuring, record, benchmark):
    """30M parameters, batch 8 x 256, fp32: Hugging Face Llama, the matmuls alone, memory."""
    pytest.importorskip(
        "transformers", reason="transformers, the peer of this case, is not installed"
    )
    from bench.peers.contenders import SHAPE
    from fastlm.config import ModelConfig
    from fastlm.model import training_flops_per_token

    names = {"matmul": "matmul", "hugging face": f"hugging face {mode}", "ours": f"ours {mode}"}
    players = {name: contender(command) for name, command in names.items()}
    for player in players.values():  # compiles, fills caches
        player()
    turns = rounds_of(players, 3 if measuring else 1, benchmark)
    if not measuring:
        return
    vocab, dim, layers, heads, ffn, batch, length = SHAPE["full"]
    config = ModelConfig(
        vocab_size=vocab, dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=heads, ffn_dim=ffn
    )
    step_flops = training_flops_per_token(config, length) * batch * length
    values = each(turns, "seconds")
    rate = [2 * 2048**3 / seconds for seconds in values["matmul"]]
    values["matmul"] = [step_flops / r for r in rate]  # the time of the step's matmuls at that rate
    speed = {
        name: {"tokens_per_second": batch * length / statistics.median(v)}
        for name, v in values.items()
    }
    speed["matmul"]["gflops"] = statistics.median(rate) / 1e9
    record(values, measures=speed)
    record(
        {name: v[-1:] for name, v in each(turns, "peak_gib").items() if name != "matmul"},
        unit="peak GiB",
    )


def test_cpu_linear_cross_entropy(contender, measuring, record, benchmark):
    """N = 4096, D = 384, V = 50257, forward and backward: torch's own, matmul + cross_entropy."""
    names = {"ours": "our head", "matmul + cross_entropy": "plain head"}
    if hasattr(F, "linear_cross_entropy"):
        names["torch linear_cross_entropy"] = "torch head"
    else:
        record(
            peer="torch linear_cross_entropy",
            missing=f"torch {torch.__version__} has no linear_cross_entropy",
        )
    players = {name: contender(command) for name, command in names.items()}
    turns = rounds_of(players, 3 if measuring else 1, benchmark)
    if measuring:
        record({name: v[1:] for name, v in each(turns, "seconds").items()})
        before = {name: player.ready["peak_gib"] for name, player in players.items()}
        record(
            {name: [1024 * v[-1]] for name, v in each(turns, "peak_gib", before).items()},
            unit="extra MiB",
        )


def test_cpu_start_up(measuring, add_measures, benchmark, tmp_path):
    """`fastlm --help`, and an eager run from the command to its first step.

    The run tokenises its text and validates.
    """
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4000, encoding="utf-8")
    options = "pretrain --preset tiny --steps 1 --seq-len 64 --batch-rows 4 --device cpu"
    run = [*options.split(), "--data", str(text), "--cache", str(tmp_path / "cache")]

    def timed(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "fastlm", *arguments], cwd=ROOT, check=True, capture_output=True
        )
        return time.perf_counter() - start

    def first_step(*arguments: str) -> float:
        start = time.perf_counter()
        command = [sys.executable, "-m", "fastlm", *arguments]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            seconds = [
                time.perf_counter() - start
                for line in process.stdout
                if line.startswith("step 1/1 ")
            ]
        assert process.returncode == 0
        return seconds[0]

    helps = [benchmark.pedantic(timed, args=("--help",))] + [
        timed("--help") for _ in range(4 if measuring else 0)
    ]
    if measuring:  # the smoke test leaves the run to the tests of the command line
        first = [first_step(*run, "--out", str(tmp_path / f"run{i}")) for i in range(3)]
        add_measures(
            help_seconds=statistics.median(helps), first_step_seconds=statistics.median(first)
        )


def test_cpu_scale_point(benchmark):
    """One small point of the scale curve, whose command is bench/scripts/cpu_scale.py."""
    from bench.scripts.cpu_scale import Point, run

    found = benchmark.pedantic(
        run, (Point(dim=64, n_layers=1, vocab_size=128, rows=1, seq_len=16), 0.0)
    )
    assert set(found["seconds"]) == {"ours", "matmul"}

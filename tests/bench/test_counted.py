"""What is counted without a GPU, against the kept results and against counts by hand."""

from __future__ import annotations

import json

import pytest
from helpers.benchmarks import BENCH, ROOT, python

from bench.counted import optimizer_step
from bench.harness import results
from fastlm.config import PRESETS


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_the_gpu_program_costs_no_more_than_the_results_say(stage):
    """Bytes moved, launches and bytes saved of the compiled step of `tiny`, counted again."""
    options = f"--preset tiny --rows 32 --seq-len 256 --stage {stage} --json"
    done = python("-m", "bench.counted.compiled_step", *options.split(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    now, kept = (
        json.loads(done.stdout.splitlines()[-1]),
        results.read(BENCH / "results" / "h100-projected.json")["rows"],
    )
    units = {
        "GB through kernels that are not matmuls": "traffic_gb",
        "launches of them": "launches",
        "GB saved for the backward": "saved_gb",
    }
    rows = [
        r
        for r in kept
        if r["case"] == f"tiny, {stage}, 32 x 256" and r["peer"] == "ours" and r["unit"] in units
    ]
    assert len(rows) == len(units)
    for r in rows:
        assert now[units[r["unit"]]] <= 1.01 * r["median"], (
            f"{r['unit']}: python -m bench.counted.gpu_program steps, if it is meant"
        )


def test_clipping_and_optimizers_cost_a_gpu_no_more_than_the_docs_say():
    """Counted for modern-253m; the same, wholly by hand, from the sizes of its matrices."""
    counted = optimizer_step.count(PRESETS["modern-253m"])
    clip, muon, adamw = (counted[name] for name in ("clip", "Muon", "AdamW"))
    assert [part.launches for part in counted.values()] == [2, 13, 2]
    hidden, others = 12 * (3 + 1 + 8 + 4) * 1024 * 1024, 50304 * 1024 + 25 * 1024
    squares = 48 * 1024 * 1024  # numbers in the Gram matrices, in fp16
    assert clip.traffic == pytest.approx(4 * (hidden + others), rel=1e-3)
    assert muon.traffic == pytest.approx((14 + 4 + 10) * hidden + 5 * 2 * 2 * squares, rel=1e-3)
    assert adamw.traffic == pytest.approx(28 * others, rel=1e-3)
    assert muon.matmuls == 30
    by_gram = (
        2 * 1024 * (2 * 2 * hidden + 14 * squares)
    )  # twice X X^T and P X; A A, A P, (A P) P and P P beside them
    assert muon.flops == pytest.approx(by_gram, rel=1e-9)
    assert muon.ms < 6.7

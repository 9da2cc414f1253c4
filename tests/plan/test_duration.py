"""Failures, checkpoints and energy against closed forms and brute force."""

from __future__ import annotations

import pytest

from fastlm import checkpoint
from fastlm.config import PRESETS, OptimConfig
from fastlm.model import Transformer
from fastlm.plan.cards import CARDS
from fastlm.plan.duration import DAY, FAILURES_PER_GPU_DAY, best_interval, checkpoint_bytes, run
from fastlm.plan.step import step
from fastlm.plan.work import Work, ways
from fastlm.train.optim import make_optimizers, named_state

H100 = CARDS["h100"]
WORK = Work(PRESETS["modern-253m"], 32, 1024)


def planned(gpus: int, tokens: float = 1e12, write_gb_s: float = 2.0):
    way = ways(gpus, 8)[0]
    return run(WORK, way, H100, step(WORK, way, H100), tokens, write_gb_s)


def test_no_interval_between_checkpoints_loses_less():
    write, between = 12.0, 5000.0

    def lost(interval: float) -> float:
        return write / interval + interval / 2 / between

    best = min(range(1, 5000), key=lost)
    assert abs(best - best_interval(write, between)) <= 1


def test_failures_are_those_of_the_published_run():
    found = planned(16384)
    assert found.failures / (found.seconds / DAY) * 54 == pytest.approx(419)


def test_a_run_is_its_tokens_over_its_rate_and_what_is_lost():
    found = planned(64)
    assert found.seconds * found.tokens_per_s * (1 - found.lost) == pytest.approx(1e12)
    assert found.tokens_per_day * found.seconds / DAY == pytest.approx(1e12)
    between = DAY / (64 * FAILURES_PER_GPU_DAY)
    wasted = found.stall_s / found.every_s + (found.every_s / 2 + 300) / between
    assert found.lost == pytest.approx(wasted / (1 + wasted))
    assert found.mwh == pytest.approx(64 * 700 * found.seconds / 3.6e9)


def test_more_gpus_are_faster_and_fail_more_often_and_a_slow_disk_costs_time():
    few, many = planned(8), planned(512)
    assert many.seconds < few.seconds
    assert many.every_s < few.every_s
    assert planned(1, write_gb_s=0.1).lost > planned(1).lost
    slow = planned(1024, write_gb_s=1e-6)
    assert slow.every_s == slow.checkpoint_s


def test_a_checkpoint_has_the_bytes_that_are_written(tmp_path):
    model = Transformer(PRESETS["tiny"])
    for p in model.parameters():
        p.detach().zero_()
    state = named_state(model, make_optimizers(model, OptimConfig()))
    place = checkpoint.save(
        tmp_path, model, state, {"step": 1, "validation_loss": None, "model": {}}
    )
    written = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    expected = checkpoint_bytes(Work(PRESETS["tiny"], 1, 8))
    assert 0 <= written - expected <= 32768  # names, step counters, the random state

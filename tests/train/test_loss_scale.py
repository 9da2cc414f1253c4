"""Loss scaling, on a CPU in fp32, where a scale of a power of two changes no bit.

As if matmuls ran in fp16.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastlm.cli import main
from fastlm.train import loop, loss_scale, run

CPU = torch.device("cpu")


def test_the_scale_moves_as_pytorch_s_own(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    ours = loss_scale.loss_scale(CPU)
    scale, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        found_inf = (torch.rand((), generator=generator) < 0.2).float()
        ours.update(found_inf)
        torch._amp_update_scale_(scale, tracker, found_inf, 2.0, 0.5, 3)
        assert ours.values() == [scale.item(), tracker.item()]


def test_a_scale_goes_on_from_its_values():
    before = loss_scale.loss_scale(CPU, [1024.0, 7.0])
    assert loss_scale.loss_scale(CPU, before.values()).values() == [1024.0, 7.0]


@pytest.fixture
def in_fp16(monkeypatch):
    monkeypatch.setattr(run, "matmul_dtype", lambda device: torch.float16)
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)


def train(small_run: list[str], out: Path, *more: str) -> list[dict]:
    """A run that keeps every checkpoint; the lines of its steps."""
    options = [
        "--validate-every",
        "0",
        "--checkpoint-every",
        "1",
        "--keep-checkpoints",
        "20",
        *more,
    ]
    assert main(["pretrain", *small_run, *options, "--out", str(out)]) == 0
    return steps_of(out)


def steps_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_scaled_run_is_the_run_without_a_scale(small_run, tmp_path, in_fp16, monkeypatch):
    scaled = train(small_run, tmp_path / "scaled", "--steps", "7", "--micro-batch-rows", "4")
    monkeypatch.undo()
    plain = train(small_run, tmp_path / "plain", "--steps", "7", "--micro-batch-rows", "4")
    assert [line["loss_scale"] for line in scaled] == [2.0**16] * 3 + [2.0**17] * 3 + [2.0**18]
    assert "loss_scale" not in plain[0]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in scaled] == [line[name] for line in plain]
    assert same(weights(tmp_path / "scaled", 7), weights(tmp_path / "plain", 7))


def test_a_step_that_overflows_is_left_out_and_the_run_goes_on_where_it_stopped(
    small_run, tmp_path, in_fp16, monkeypatch
):
    clip, taken = loop.clip, []

    def overflowing(model, *rest):
        taken.append(len(taken) + 1)
        if taken[-1] == 3:
            next(model.parameters()).grad[0, 0] = torch.inf
        return clip(model, *rest)

    monkeypatch.setattr(loop, "clip", overflowing)
    found = train(small_run, tmp_path / "run", "--steps", "8")
    assert [line["loss_scale"] / 2**16 for line in found] == [1, 1, 1, 0.5, 0.5, 0.5, 1, 1]
    assert found[2]["grad_norm"] == float("inf")
    assert same(weights(tmp_path / "run", 2), weights(tmp_path / "run", 3))
    assert not same(weights(tmp_path / "run", 3), weights(tmp_path / "run", 4))
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in (6, 7, 8):
        shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
    assert main(["pretrain", "--resume", str(again)]) == 0
    assert [line["loss_scale"] for line in steps_of(again)] == [
        line["loss_scale"] for line in found
    ]
    assert same(weights(again, 8), weights(tmp_path / "run", 8))

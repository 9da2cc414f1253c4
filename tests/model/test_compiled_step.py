"""A whole compiled training step's GPU program, written and executed without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm.config import PRESETS
from fastlm.model import training_flops_per_token

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.slow

# relative errors of the loss and of each gradient
FP32 = 2e-6
BF16 = 1e-2
COMPILED = {
    "tiny": ("tiny", 2, 64, False),
    "modern-253m": ("modern-253m", 32, 1024, False),
    "recomputing": ("modern-253m", 32, 1024, True),
}
EXECUTED = [(False, False, FP32), (True, False, BF16), (False, True, FP32), (True, True, BF16)]


def run(cases: list) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE / "compiled_step.py", json.dumps(cases)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def programs() -> dict[str, dict]:
    return dict(zip(COMPILED, run([("compile", *case) for case in COMPILED.values()]), strict=True))


@pytest.mark.parametrize("name", COMPILED)
def test_the_whole_step_is_one_forward_and_one_backward_graph(programs, name):
    assert programs[name]["graphs"] == ["forward", "backward"]
    assert "fastlm.linear_cross_entropy.default" in programs[name]["custom_ops"]


def test_the_step_has_exactly_the_matmuls_it_must_have(programs):
    """All but attention's, which are not counted, and the head's three inside the fused loss."""
    config = PRESETS["modern-253m"]
    attention = config.n_layers * 6 * 1024 * config.dim
    head = 6 * config.vocab_size * config.dim
    expected = 32 * 1024 * (training_flops_per_token(config, 1024) - attention - head) / 1e12
    assert programs["modern-253m"]["matmul_tflop"] == pytest.approx(expected, rel=1e-6)


def test_activation_checkpointing_saves_less_than_half(programs):
    assert programs["recomputing"]["saved_gb"] < 0.5 * programs["modern-253m"]["saved_gb"]


@pytest.fixture(scope="module")
def executions() -> list[dict]:
    return run([("execute", *case[:2]) for case in EXECUTED])


@pytest.mark.parametrize(
    "i", range(len(EXECUTED)), ids=["fp32", "bf16", "fp32 recomputing", "bf16 recomputing"]
)
def test_the_executed_gpu_step_gives_eager_loss_and_gradients(executions, i):
    result, tolerance = executions[i], EXECUTED[i][2]
    assert result["launches"] > 0
    assert result["loss"] < tolerance
    worst = max(result["gradients"], key=result["gradients"].get)
    assert result["gradients"][worst] < tolerance, worst

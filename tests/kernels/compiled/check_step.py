"""The whole compiled GPU step of `tiny` with the Triton kernels in it, executed on the CPU.

Loss and gradients equal eager's.

Generated kernels and ours run as PTX in the simulator, matmuls and attention by PyTorch's CPU
operators. Run by test_compiled.py, in a process of its own.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gpuless"))

from fastlm.config import PRESETS
from fastlm.kernels.common import triton_on_cpu
from fastlm.model import build
from gpurun import run_for_gpu
from ptxsim import launches


@pytest.mark.parametrize(
    ("autocast", "tolerance"), [(False, 5e-6), (True, 1e-2)], ids=["fp32", "bf16"]
)
def test_the_gpu_step_with_its_triton_kernels_equals_eager(autocast, tolerance):
    torch.manual_seed(0)
    model = build(replace(PRESETS["tiny"], vocab_size=500), 0, torch.device("cpu"))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1)
    tokens, targets = torch.randint(500, (2, 2, 16)).unbind(0)
    targets[0, :5] = -100
    twin = copy.deepcopy(model)

    def step(m):
        def run(tokens, targets):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return m.loss(tokens, targets, 1e-4) / targets.numel()

        return run

    loss = step(model)(tokens, targets)
    loss.backward()
    with triton_on_cpu(), launches(target=90) as record:
        report, _ = run_for_gpu(step(twin), lambda: (tokens, targets))
    ran = {name for name, _ in record}
    assert {
        "rms_norm_forward_kernel",
        "swiglu_backward_kernel",
        "rope_kernel",
        "cross_entropy_kernel",
    } <= ran
    assert abs(report.result.item() / loss.item() - 1) < tolerance
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < tolerance * a.grad.norm(), name

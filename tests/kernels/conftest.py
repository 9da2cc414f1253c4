"""Every test here runs the Triton kernels: on the GPU where there is one, else on CPU tensors in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from fastlm.kernels.launches import triton_on_cpu

interpreter_converts = interpreter._convert_float


def convert_as_hardware_does(data, source, target, rounding_mode):
    """The interpreter cuts fp32 off to make it bf16; a GPU rounds to the nearest, ties to even."""
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        nan = np.isnan(data)
        return np.where(nan, 0x7FC0, (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if source == tl.bfloat16 and target == tl.float32:
        return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
    return interpreter_converts(data, source, target, rounding_mode)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cpu_path() -> None:
    """For tests of what a CPU tensor gets."""


@pytest.fixture(autouse=True)
def triton_path(request, monkeypatch):
    """CPU tensors take the Triton path too, except in tests that ask for `cpu_path`."""
    torch.manual_seed(0)
    if "cpu_path" in request.fixturenames:
        yield
    else:
        monkeypatch.setattr(interpreter, "_convert_float", convert_as_hardware_does)
        with triton_on_cpu(), np.errstate(all="ignore"):
            yield

"""Every test here runs the Triton kernels, on the GPU or else in the interpreter, and the native
CPU kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from fastlm.kernels import native
from fastlm.kernels.common import triton_on_cpu

interpreter_converts = interpreter._convert_float


def convert_as_hardware_does(data, source, target, rounding_mode):
    """The interpreter cuts fp32 off to make it bf16; a GPU rounds to the nearest, ties to even."""
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        nan = np.isnan(data)
        return np.where(
            nan, 0x7FC0, (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        ).astype(np.uint16)
    if source == tl.bfloat16 and target == tl.float32:
        return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
    return interpreter_converts(data, source, target, rounding_mode)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cpu_path() -> None:
    """For tests of what a CPU tensor gets."""


@pytest.fixture
def triton_only() -> None:
    """For tests of what only the Triton kernels promise."""


def pytest_generate_tests(metafunc) -> None:
    """Without a GPU, each test runs on the Triton kernels and, where they are built, on the native
    CPU kernels.
    """
    names = metafunc.fixturenames
    if "cpu_path" in names:
        paths = ["cpu"]
    elif "triton_only" in names or torch.cuda.is_available() or native._native is None:
        paths = ["triton"]
    else:
        paths = ["triton", "native"]
    metafunc.parametrize(
        "kernel_path", paths, indirect=True, ids=paths if len(paths) > 1 else [pytest.HIDDEN_PARAM]
    )


@pytest.fixture(autouse=True)
def kernel_path(request, monkeypatch):
    """Which kernels CPU tensors get in this test."""
    torch.manual_seed(0)
    if request.param == "triton":
        monkeypatch.setattr(interpreter, "_convert_float", convert_as_hardware_does)
        with triton_on_cpu(), np.errstate(all="ignore"):
            yield
    else:
        yield

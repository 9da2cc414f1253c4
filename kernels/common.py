"""What the ops share: who computes a tensor, views of rows, dtypes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

_library = Library("fastlm", "FRAGMENT")
_triton_on_cpu = False


def call_directly_on_cpu(op: Any) -> None:
    """Tell PyTorch's dispatcher to call the function of a custom op, as it is, with CPU tensors.

    What register_kernel() of a custom op wraps around it imports torch._dynamo at the first call,
    which costs every command that does not compile 1.6 s and 77 MiB (two slow cores).
    """
    _library.impl(op._name, op._init_fn, "CPU")


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Inside, CPU tensors take the Triton kernels: something must stand in for the GPU.

    Such as Triton's interpreter.
    """
    global _triton_on_cpu
    before = _triton_on_cpu
    _triton_on_cpu = True
    try:
        yield
    finally:
        _triton_on_cpu = before


def takes_triton(tensor: Tensor) -> bool:
    """Whether the tensor is for the Triton kernels: it is on a GPU."""
    return tensor.device.type != "cpu" or _triton_on_cpu


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) as (M, D) with a last stride of 1: a view where strides allow one, or a copy."""
    width = x.shape[-1]
    rows = x.reshape(-1, width) if x.numel() else x.new_empty(x.shape[:-1].numel(), width)
    return rows if rows.stride(1) == 1 or width == 1 else rows.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: fp32, or fp64 for fp64 (which only the references take)."""
    return torch.promote_types(dtype, torch.float32)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matmul of x runs in: x's own, or autocast's where that is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()

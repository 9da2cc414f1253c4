"""What the ops share: Triton where there is one, views of rows, dtypes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

tl: Any = None  # triton.language, in a module of kernels as soon as one of them is launched
_library = Library("fastlm", "FRAGMENT")
_triton_on_cpu = False


def cpu_kernel(op: Any, kernel: Callable | None = None) -> None:
    """Make kernel what op does with CPU tensors; without one, op's own function.

    Told to the dispatcher directly: what register_kernel() of a custom op wraps around a kernel imports torch._dynamo at the
    first call, which costs every command that does not compile 1.6 s and 77 MiB (two slow cores).
    """

    def run(*args: Any) -> Any:
        return op._init_fn(*args) if kernel is None or _triton_on_cpu else kernel(*args)

    _library.impl(op._name, run, "CPU")


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Inside, CPU tensors take the Triton path: something else must stand in for the GPU, such as Triton's interpreter."""
    global _triton_on_cpu
    before, _triton_on_cpu = _triton_on_cpu, True
    try:
        yield
    finally:
        _triton_on_cpu = before


def takes_triton(tensor: Tensor) -> bool:
    """Whether a function that is no op of PyTorch's, and so not dispatched by it, launches Triton kernels for the tensor."""
    return tensor.is_cuda or _triton_on_cpu


class Kernel:
    """A function for triton.jit, handed over when the first kernel of its module is launched.

    Where tensors are on a CPU that never happens: Triton need not be there, and its import, 66 MiB, is spared.
    """

    def __init__(self, fn: Callable, **options: Any):
        self.fn, self.options = fn, options

    def __getitem__(self, grid: tuple) -> Callable:
        import triton

        module = self.fn.__globals__  # where Triton looks up what a kernel names: `tl` and other kernels
        module["tl"] = triton.language
        for name, kernel in [(name, value) for name, value in module.items() if isinstance(value, Kernel)]:
            module[name] = triton.jit(kernel.fn, **kernel.options)
        return module[self.fn.__name__][grid]


def jit(**options: Any) -> Any:
    """triton.jit with options, but only when it is needed."""
    return partial(Kernel, **options)


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) as (M, D) whose last stride is 1: a view where the strides allow one, otherwise a copy."""
    width = x.shape[-1]
    rows = x.reshape(-1, width) if x.numel() else x.new_empty(x.shape[:-1].numel(), width)
    return rows if rows.stride(1) == 1 or width == 1 else rows.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: fp32, or fp64 for fp64 input (which only the reference path takes)."""
    return torch.promote_types(dtype, torch.float32)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matmul of x runs in: x's own, or autocast's where autocast is on for x's device."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()

"""What the ops share: views of rows, the accumulation dtype, autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) as (M, D) whose last stride is 1: a view where the strides allow one, otherwise a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


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

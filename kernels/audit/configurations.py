"""The shipped configurations: each op and direction as a launch at the widths that models have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.kernels.common import cdiv
from fastlm.kernels.loss_options import LossOptions
from fastlm.kernels.triton import cross_entropy, rms_norm, rope, swiglu

Make = Callable[..., Tensor]
SEQUENCES = 32  # of 1024 tokens in modern-253m's batch, which share cos and sin


@dataclass(frozen=True)
class Case:
    """One launch of one op. launch(make, rows) makes its inputs and launches.

    It makes them with make(*shape, dtype=...). bulk: the operands that are streamed; the others are
    small or stay in cache. floor: the bytes that a row must move at least.
    """

    op: str
    direction: str
    width: int
    dtype: torch.dtype
    bulk: tuple[str, ...]
    floor: int
    launch: Callable[[Make, int], object]

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.direction} {self.width} {dtype}"


def _norm(width: int, dtype: torch.dtype, add: bool, direction: str) -> Case:
    def forward(make: Make, rows: int) -> object:
        x = make(rows, width, dtype=dtype)
        residual = make(rows, width, dtype=dtype) if add else None
        return rms_norm.forward(x, residual, make(width, dtype=torch.float32), 1e-5)

    def backward(make: Make, rows: int) -> object:
        dy, x, dsum = (make(rows, width, dtype=dtype) for _ in range(3))
        rstd = make(rows, dtype=torch.float32)
        weight = make(width, dtype=torch.float32)
        return rms_norm.backward(dy, x, weight, rstd, dsum if add else None)

    if direction == "forward":
        launch = forward
        passes = 4 if add else 2
    else:
        launch = backward
        passes = 4 if add else 3
    op = "add_rms_norm" if add else "rms_norm"
    bulk = ("x", "residual", "y", "total", "dy", "dsum", "dx")
    floor = passes * width * dtype.itemsize + 4  # rstd
    return Case(op, direction, width, dtype, bulk, floor, launch)


def _rope(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, inverse: bool) -> Case:
    table = torch.float16 if dtype.itemsize == 2 else torch.float32  # as the model holds them

    def launch(make: Make, rows: int) -> object:
        packed = make(1, rows, heads + 2 * kv_heads, head_dim, dtype=dtype)
        q, k, _ = packed.split([heads, kv_heads, kv_heads], 2)
        cos, sin = (make(rows, head_dim // 2, dtype=table) for _ in range(2))
        return rope.rotate(q, k, cos, sin, None, inverse)

    heads_bytes = (heads + kv_heads) * head_dim * dtype.itemsize
    floor = 2 * heads_bytes + table.itemsize * head_dim // SEQUENCES
    direction = "backward" if inverse else "forward"
    bulk = ("q", "k", "q_out", "k_out")
    return Case("rope", direction, heads * head_dim, dtype, bulk, floor, launch)


def _swiglu(width: int, dtype: torch.dtype, direction: str) -> Case:
    def forward(make: Make, rows: int) -> object:
        return swiglu.forward(make(rows, 2 * width, dtype=dtype))

    def backward(make: Make, rows: int) -> object:
        gate_up = make(rows, 2 * width, dtype=dtype)
        dy = make(rows, width, dtype=dtype)
        return swiglu.backward(dy, gate_up, direction == "backward + y")

    passes = {"forward": 3, "backward": 5, "backward + y": 6}[direction]
    floor = passes * width * dtype.itemsize
    launch = forward if direction == "forward" else backward
    bulk = ("gate_up", "dy", "y", "dgate_up")
    return Case("swiglu", direction, width, dtype, bulk, floor, launch)


def _entropy(width: int, dtype: torch.dtype, direction: str) -> Case:
    def launch(make: Make, rows: int) -> None:
        loss, lse = (make(rows, dtype=torch.float32) for _ in range(2))
        targets = make(rows, dtype=torch.int64)
        options = LossOptions()
        if direction == "in place":
            logits = make(rows, cdiv(width, 64) * 64, dtype=dtype)[:, :width]
            cross_entropy.rows(logits, targets, loss, lse, None, logits, options)
            return
        logits = make(rows, width, dtype=dtype)
        if direction == "forward":
            cross_entropy.rows(logits, targets, loss, lse, None, None, options)
            return
        dlogits = make(rows, width, dtype=dtype)
        cross_entropy.rows(logits, targets, None, lse, loss, dlogits, options)

    # beside the logits: a target, and what is read or written of loss, lse and dloss
    passes = {"forward": 1, "backward": 2, "in place": 3}[direction]
    floor = passes * width * dtype.itemsize + 16
    op = "linear_cross_entropy" if direction == "in place" else "cross_entropy"
    return Case(op, direction, width, dtype, ("logits", "out"), floor, launch)


def cases(dtype: torch.dtype = torch.bfloat16, every_width: bool = False) -> list[Case]:
    """Each op and direction at modern-253m's widths.

    With every_width, once for each choice of block size and warps.
    """
    found: list[Case] = []
    for width in (1024, *((64, 512, 2048, 4096, 8192) if every_width else ())):
        for add in (False, True):
            found += [_norm(width, dtype, add, d) for d in ("forward", "backward")]
    for heads, kv_heads in ((16, 16), (9, 3)):
        found += [_rope(heads, kv_heads, 64, dtype, inverse) for inverse in (False, True)]
    for width in (4096, *((64,) if every_width else ())):
        found += [_swiglu(width, dtype, d) for d in ("forward", "backward", "backward + y")]
    for width in (50257, *((1000,) if every_width else ())):
        found += [_entropy(width, dtype, d) for d in ("forward", "backward", "in place")]
    return found

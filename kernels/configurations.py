"""The shipped configurations: each op and direction as a launch at the widths that models have, with its traffic floor."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# by module: the functions rms_norm, rope, swiglu and cross_entropy stand in the package under their modules' names
rms_norm, rope, swiglu, cross_entropy = (
    importlib.import_module(f"fastlm.kernels.{name}") for name in ("rms_norm", "rope", "swiglu", "cross_entropy")
)

Make = Callable[..., Tensor]
SEQUENCES = 32  # of 1024 tokens in modern-253m's batch, which share cos and sin


@dataclass(frozen=True)
class Case:
    """One launch of one op. launch(make, rows) makes its inputs with make(*shape, dtype=...) and launches."""

    op: str
    direction: str
    width: int
    dtype: torch.dtype
    bulk: tuple[str, ...]  # operands that are streamed; the others are small or stay in cache
    floor: int  # bytes a row must move at least
    launch: Callable[[Make, int], object]

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} {self.width} {str(self.dtype).removeprefix('torch.')}"


def _norm(width: int, dtype: torch.dtype, add: bool, direction: str) -> Case:
    size, bulk = dtype.itemsize, ("x", "residual", "y", "total", "dy", "dsum", "dx")
    if direction == "forward":

        def launch(make: Make, rows: int) -> object:
            x = make(rows, width, dtype=dtype)
            residual = make(rows, width, dtype=dtype) if add else None
            return rms_norm._launch_forward(x, residual, make(width, dtype=torch.float32), 1e-5)

        passes = 4 if add else 2
    else:
        emit = direction == "backward + y"

        def launch(make: Make, rows: int) -> object:
            dy, x, dsum = (make(rows, width, dtype=dtype) for _ in range(3))
            rstd = make(rows, dtype=torch.float32)
            weight = make(width, dtype=torch.float32)
            return rms_norm._launch_backward(dy, x, weight, rstd, dsum if add else None, emit)

        passes = 3 + add + emit
    return Case("add_rms_norm" if add else "rms_norm", direction, width, dtype, bulk, passes * width * size + 4, launch)


def _rope(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, inverse: bool) -> Case:
    table = torch.float16 if dtype.itemsize == 2 else torch.float32  # as the model holds them

    def launch(make: Make, rows: int) -> object:
        packed = make(1, rows, heads + 2 * kv_heads, head_dim, dtype=dtype)
        q, k, _ = packed.split([heads, kv_heads, kv_heads], 2)
        cos, sin = (make(rows, head_dim // 2, dtype=table) for _ in range(2))
        return rope._launch(q, k, cos, sin, None, inverse)

    floor = 2 * (heads + kv_heads) * head_dim * dtype.itemsize + table.itemsize * head_dim // SEQUENCES
    direction = "backward" if inverse else "forward"
    return Case("rope", direction, heads * head_dim, dtype, ("q", "k", "q_out", "k_out"), floor, launch)


def _swiglu(width: int, dtype: torch.dtype, direction: str) -> Case:
    def forward(make: Make, rows: int) -> object:
        return swiglu._launch_forward(make(rows, 2 * width, dtype=dtype))

    def backward(make: Make, rows: int) -> object:
        gate_up, dy = make(rows, 2 * width, dtype=dtype), make(rows, width, dtype=dtype)
        return swiglu._launch_backward(dy, gate_up, direction == "backward + y")

    passes = {"forward": 3, "backward": 5, "backward + y": 6}[direction]
    bulk = ("gate_up", "dy", "y", "dgate_up")
    launch = forward if direction == "forward" else backward
    return Case("swiglu", direction, width, dtype, bulk, passes * width * dtype.itemsize, launch)


def _entropy(width: int, dtype: torch.dtype, direction: str) -> Case:
    def launch(make: Make, rows: int) -> object:
        loss, lse = (make(rows, dtype=torch.float32) for _ in range(2))
        targets, options = make(rows, dtype=torch.int64), (-100, 0.0, 0.0, 0.0, width)
        if direction == "in place":
            logits = make(rows, -(-width // 64) * 64, dtype=dtype)[:, :width]
            return cross_entropy.launch_rows(logits, targets, loss, lse, None, logits, options)
        logits = make(rows, width, dtype=dtype)
        if direction == "forward":
            return cross_entropy.launch_rows(logits, targets, loss, lse, None, None, options)
        out = make(rows, width, dtype=dtype)
        return cross_entropy.launch_rows(logits, targets, loss[:0], lse, loss, out, options)

    passes, rest = {"forward": (1, 16), "backward": (2, 16), "in place": (3, 16)}[direction]
    op = "linear_cross_entropy" if direction == "in place" else "cross_entropy"
    return Case(op, direction, width, dtype, ("logits", "out"), passes * width * dtype.itemsize + rest, launch)


def cases(dtype: torch.dtype = torch.bfloat16, every_width: bool = False) -> list[Case]:
    """Each op and direction at modern-253m's widths; with every_width, once for each choice of block size and warps."""
    wide = (64, 512, 2048, 4096, 8192) if every_width else ()
    return [
        *(_norm(w, dtype, add, d) for w in (1024, *wide) for add in (False, True) for d in ("forward", "backward")),
        _norm(1024, dtype, True, "backward + y"),
        *(_rope(h, kv, 64, dtype, inverse) for h, kv in ((16, 16), (9, 3)) for inverse in (False, True)),
        *(_swiglu(w, dtype, d) for w in (4096, *wide[:1]) for d in ("forward", "backward", "backward + y")),
        *(_entropy(w, dtype, d) for w in (50257, *((1000,) if wide else ())) for d in ("forward", "backward", "in place")),
    ]

"""The operations that are measured, ours and the same in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import kernels

EPS = 1e-5
OPS = ("rms_norm", "add_rms_norm", "swiglu", "rope", "cross_entropy")
MOVED = {
    "rms_norm": (2, 3),
    "add_rms_norm": (4, 4),
    "swiglu": (3, 5),
    "rope": (4, 4),
    "cross_entropy": (1, 2),
}


def moved(op: str, rows: int, width: int, part: str) -> int:
    """Elements that the forward, the backward or both must read and write: each operand once."""
    forward, backward = (passes * rows * width for passes in MOVED[op])
    return {"forward": forward, "backward": backward, "both": forward + backward}[part]


def inputs(op: str, rows: int, width: int, **options) -> tuple[list[Tensor], list[Tensor]]:
    """Random tensors: those that get a gradient, and those that get none.

    options: dtype and device.
    """
    if op == "rope":
        angles = torch.rand(rows, 32, device=options.get("device")) * 6.3
        return [torch.randn(1, rows, width // 64, 64, **options) for _ in range(2)], [
            angles.cos(),
            angles.sin(),
        ]
    if op == "swiglu":
        return [torch.randn(rows, 2 * width, **options)], []
    x = torch.randn(rows, width, **options)
    if op == "cross_entropy":
        return [x], [torch.randint(width, (rows,), device=x.device)]
    weight = torch.randn(width, **options)
    return [x, weight] if op == "rms_norm" else [x, torch.randn_like(x), weight], []


def rms_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def add_rms_norm(x, residual, weight):
    return F.rms_norm(x + residual, weight.shape, weight, EPS), x + residual


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rope(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def one(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    return one(q), one(k)


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float(), targets)


PLAIN: dict[str, Callable] = {
    f.__name__: f for f in (rms_norm, add_rms_norm, swiglu, rope, cross_entropy)
}
OURS: dict[str, Callable] = {
    "rms_norm": lambda x, w: kernels.rms_norm(x, w, EPS),
    "add_rms_norm": lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS),
    "swiglu": kernels.swiglu,
    "rope": kernels.rope,
    "cross_entropy": kernels.cross_entropy,
}


def part_of(
    function: Callable, given: tuple[list[Tensor], list[Tensor]], part: str
) -> Callable[[], object]:
    """A call of the function's forward, of its backward, or of both.

    The forward alone runs on inputs without gradients; the backward alone keeps the graph.
    """
    leaves, rest = [x.detach().requires_grad_(part != "forward") for x in given[0]], given[1]

    def forward():
        out = function(*leaves, *rest)
        return out if isinstance(out, tuple) else (out,)

    if part == "forward":
        return forward
    out = forward()
    upstream = [torch.randn_like(o) for o in out]
    if part == "backward":
        return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, upstream)


def a_copy(elements: int, **options) -> Callable[[], object]:
    """A copy that reads and writes as many elements in all: no operation can be faster."""
    source = torch.randn(elements // 2, **options)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)

"""Each op on the CPU against eager PyTorch, against Inductor, and against a copy of as many bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import ratio

from fastlm import kernels
from fastlm.kernels.cpu import keep_large_blocks

EPS = 1e-5


def plain_swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def plain_rope(q, k, cos, sin):
    def one(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    return one(q), one(k)


def cases(rows: int, width: int) -> dict:
    """name -> (ours, plain, inputs, elements read and written: forward, backward)."""
    n, table = rows * width, torch.randn(2, rows, 1, 32)
    x, r, w = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    packed, heads = torch.randn(rows, 2 * width), torch.randn(2, 1, rows, width // 64, 64)
    targets = torch.randint(width, (rows,))
    return {
        "rms_norm": (
            lambda x, w: kernels.rms_norm(x, w, EPS),
            lambda x, w: F.rms_norm(x, (width,), w, EPS),
            [x, w], 2 * n, 3 * n,
        ),
        "add_rms_norm": (
            lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS),
            lambda x, r, w: (F.rms_norm(x + r, (width,), w, EPS), x + r),
            [x, r, w], 4 * n, 4 * n,
        ),
        "swiglu": (kernels.swiglu, plain_swiglu, [packed], 3 * n, 5 * n),
        "rope": (
            lambda q, k: kernels.rope(q, k, table[0, :, 0], table[1, :, 0]),
            lambda q, k: plain_rope(q, k, table[0], table[1]),
            list(heads), 4 * n, 4 * n,
        ),
        "cross_entropy": (
            lambda z: kernels.cross_entropy(z, targets),
            lambda z: F.cross_entropy(z, targets),
            [x], n, 2 * n,
        ),
    }  # fmt: skip


def timed_part(function, inputs: list[torch.Tensor], part: str):
    """The forward alone, or the backward alone (the graph kept)."""
    if part == "forward":

        def forward():
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [torch.randn_like(o) for o in out]
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "swiglu", "rope", "cross_entropy"])
@pytest.mark.parametrize("shape", [(8192, 1024), (2048, 4096)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_cpu_op(shape, op, part, measuring, take_turns, report):
    keep_large_blocks()
    torch._dynamo.reset()
    rows, width = shape if measuring else (16, 128)
    ours, plain, inputs, *moved = cases(rows, width)[op]
    source = torch.randn(moved[part == "backward"] // 2)
    target = torch.empty_like(source)
    rivals = {"eager": timed_part(plain, inputs, part), "copy": lambda: target.copy_(source)}
    if measuring:
        rivals["inductor"] = timed_part(torch.compile(plain, dynamic=False), inputs, part)
    times = take_turns(timed_part(ours, inputs, part), rivals, rounds=15)
    if times:
        mine = times.pop("ours")
        report(
            milliseconds=1e3 * sorted(mine)[len(mine) // 2],
            times_eager=ratio(times["eager"], mine),
            times_inductor=ratio(times["inductor"], mine),
            of_copy=1 / ratio(times["copy"], mine),
        )

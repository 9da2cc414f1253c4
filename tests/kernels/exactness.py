"""The tolerance rule, and the properties that every op must have whatever it computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# What a kernel's relative error may exceed same-dtype PyTorch's by: a few roundings of the fp32
# arithmetic inside; for the 16-bit types a hundredth or so of their own rounding error, since they
# round an fp32 result with other last bits.
EXCESS = {torch.float32: 5e-7, torch.bfloat16: 1e-4, torch.float16: 1.5e-5}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def error(actual: Tensor, truth: Tensor) -> float:
    """Relative error, root mean square."""
    return (
        ((actual.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()
        if truth.numel()
        else 0.0
    )


def assert_as_exact(
    actual: Tensor, truth: Tensor, same_dtype: Tensor, what: str = "", scale: float = 1.0
) -> None:
    """actual's error against float64 is at most same-dtype PyTorch's plus EXCESS (times scale).

    Or each number is rightly rounded, within 0.51 units in the last place of the truth: that
    decides for tensors of a few numbers, where PyTorch's error can be 0 by luck.
    """
    assert actual.dtype == same_dtype.dtype, (
        f"{what}: dtype {actual.dtype}, expected {same_dtype.dtype}"
    )
    assert actual.shape == truth.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    )
    assert actual.isfinite().all(), f"{what}: not finite"
    limit = error(same_dtype, truth) + scale * EXCESS[actual.dtype]
    ulp = (
        truth.abs().clamp(min=torch.finfo(actual.dtype).tiny).log2().floor().exp2()
        * torch.finfo(actual.dtype).eps
    )
    rounded = bool(((actual.double() - truth).abs() <= 0.51 * ulp).all())
    assert rounded or error(actual, truth) <= limit, (
        f"{what}: error {error(actual, truth):.3g}, allowed {limit:.3g}"
    )


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Fresh leaves with the same values, strides kept."""
    return [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.is_floating_point())
        for t in tensors
    ]


def run(fn: Callable, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs of fn and gradients of the inputs that take one, for these upstream gradients."""
    out = fn(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(
        out, wanted, [g.to(o.dtype) for g, o in zip(upstream, out, strict=True)], allow_unused=True
    )
    return [*out, *grads]


def check(
    op: Callable, plain: Callable, inputs: list[Tensor], upstream: list[Tensor], scale: float = 1.0
) -> None:
    """op against plain PyTorch in float64 and in the same dtype.

    Every output and every gradient, by the tolerance rule.

    Also: inputs and upstream gradients are bitwise unchanged, a second run and a run without
    gradients give the same bits.
    """
    ours = leaves(*inputs)
    before = [x.detach().clone() for x in (*ours, *upstream)]
    actual = run(op, ours, upstream)
    again = run(op, ours, upstream)
    with torch.no_grad():
        bare = op(*ours)
    bare = bare if isinstance(bare, tuple) else (bare,)
    for x, b in zip((*ours, *upstream), before, strict=True):
        assert same_bits(x.detach(), b), "an input or an upstream gradient was modified"
    for a, b in zip((*actual, *bare), (*again, *actual[: len(bare)]), strict=True):
        assert same_bits(a.detach(), b.detach()), "not reproducible"
    same = run(plain, leaves(*inputs), upstream)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = run(plain, leaves(*exact), [g.double() for g in upstream])
    for i, (a, t, s) in enumerate(zip(actual, truth, same, strict=True)):
        assert_as_exact(a.detach(), t.detach(), s.detach(), f"result {i}", scale)


def check_once(
    op: Callable, plain: Callable, inputs: list[Tensor], upstream: list[Tensor], scale: float = 1.0
) -> None:
    """The tolerance rule of check, without its other runs.

    Where many rows or a wide one would make them dear.
    """
    actual = run(op, leaves(*inputs), upstream)
    same = run(plain, leaves(*inputs), upstream)
    truth = run(plain, leaves(*[x.double() for x in inputs]), [g.double() for g in upstream])
    for i, (a, t, s) in enumerate(zip(actual, truth, same, strict=True)):
        assert_as_exact(a.detach(), t.detach(), s.detach(), f"result {i}", scale)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(
            a.contiguous().view(kinds[a.element_size()]),
            b.contiguous().view(kinds[b.element_size()]),
        )
    )


def unaligned(x: Tensor, offset: int = 1) -> Tensor:
    """The same numbers in a tensor whose pointer is not 16-byte aligned."""
    store = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
    out = store[offset:].view(x.shape)
    out.copy_(x)
    return out

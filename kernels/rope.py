"""Rotary position embedding of q and k together, half-rotation as in Hugging Face Llama.

    with h = Dh / 2, c = cos[p], s = sin[p] at the token's position p:
    out[j] = x[j] c[j] - x[j + h] s[j]     out[j + h] = x[j + h] c[j] + x[j] s[j]     0 <= j < h
    The backward is the same rotation with -s.

q: (B, T, H, Dh); k: (B, T, Hkv, Dh), both possibly strided views of one packed tensor; cos, sin:
(max_seq_len, Dh / 2) fp32 or fp16; positions: (B, T) integers, or None for 0, 1, ..., T - 1 in
every row. Results are contiguous, in the inputs' dtype, computed in fp32. Saved for the backward:
cos, sin and positions only. Floor: q and k read once and written once; cos and sin once per token.
Source: Su et al., RoFormer, 2021, equation 34, in the layout of GPT-NeoX and Llama.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import accumulation_dtype, call_directly_on_cpu, takes_triton


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, Dh) rotated by cos, sin (B or 1, T, Dh / 2)."""
    acc = accumulation_dtype(x.dtype)
    cos = cos.to(acc).unsqueeze(-2)
    sin = sin.to(acc).unsqueeze(-2)
    first, second = x.to(acc).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(q, k) rotated, in plain PyTorch."""
    if positions is None:
        positions = torch.arange(q.shape[1], device=q.device).unsqueeze(0)
    cos = cos[positions.long()]  # (B or 1, T, Dh / 2)
    sin = sin[positions.long()]
    return _rotate_reference(q, cos, sin), _rotate_reference(k, cos, sin)


def rope_backward_reference(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k from those of the rotated ones: a rotation by the negative angle."""
    return rope_reference(dq, dk, cos, -sin, positions)


@torch.library.custom_op("fastlm::rope", mutates_args=())
def _rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """(q, k) rotated, by the negative angle where inverse."""
    if takes_triton(q):
        from fastlm.kernels.triton import rope as on_gpu

        return on_gpu.rotate(q, k, cos, sin, positions, inverse)
    if native.available(q, k) and cos.dtype != torch.float64:
        return native.rope(q, k, cos.float(), sin.float(), positions, inverse)
    reference = rope_backward_reference if inverse else rope_reference
    return reference(q, k, cos, sin, positions)


@_rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk = _rope(dq, dk, *ctx.saved_tensors, not ctx.inverse)
    return dq, dk, None, None, None, None


_rope.register_autograd(_backward, setup_context=_save)
call_directly_on_cpu(_rope)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their tokens' positions.

    out = [x1 cos - x2 sin, x2 cos + x1 sin], x1 and x2 the halves of a head. q (B, T, H, Dh),
    k (B, T, Hkv, Dh), any strides with a contiguous last dimension costing no copy; cos, sin
    (max_seq_len, Dh / 2) the angles' cosine and sine, fp32, or fp16 for 16-bit q and k; positions
    (B, T) integers or None for 0 .. T - 1. Returns contiguous tensors in q's and k's dtypes,
    whatever autocast says. cos, sin and positions get no gradient. A position outside cos gives NaN
    on a GPU and an IndexError on a CPU. Raises ValueError on shapes that do not fit.
    Source: Su et al. 2021, equation 34.
    """
    of_heads = q.dim() == k.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not of_heads or q.shape[3] % 2:
        expected = "(B, T, H, Dh) and (B, T, Hkv, Dh) with an even Dh"
        raise ValueError(f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} must be {expected}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] * 2 != q.shape[3]:
        shapes = f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        raise ValueError(f"rope: {shapes} must be (max_seq_len, {q.shape[3] // 2})")
    if positions is None and cos.shape[0] < q.shape[1]:
        held = f"{q.shape[1]} tokens but cos and sin hold {cos.shape[0]} positions"
        raise ValueError(f"rope: {held}; make the tables longer")
    if positions is not None and positions.shape != q.shape[:2]:
        expected = f"(B, T) = {tuple(q.shape[:2])}"
        raise ValueError(f"rope: positions {tuple(positions.shape)} must be {expected}")
    if native.direct(q) and k.dtype == q.dtype and cos.dtype == torch.float32:
        return native.rope(q, k, cos, sin, positions, False)
    return _rope(q, k, cos, sin, positions, False)

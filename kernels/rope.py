"""Rotary position embedding of q and k together, half-rotation as in Hugging Face Llama.

    with h = Dh / 2, c = cos[p], s = sin[p] at the token's position p:
    out[j] = x[j] c[j] - x[j + h] s[j]          out[j + h] = x[j + h] c[j] + x[j] s[j]          0 <= j < h
    The backward is the same rotation with -s.

q: (B, T, H, Dh); k: (B, T, Hkv, Dh), both possibly strided views of one packed tensor; cos, sin: (max_seq_len, Dh /
2) fp32 or fp16; positions: (B, T) integers, or None for 0, 1, ..., T - 1 in every row. Results are contiguous, in the inputs'
dtype, computed in fp32. Saved for the backward: cos, sin and positions only. Floor: q and k read once and written
once; cos and sin once per token. Source: Su et al., RoFormer, 2021, equation 34, in the layout of GPT-NeoX and Llama.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import accumulation_dtype, cpu_kernel, jit, next_power_of_2, tl


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, Dh) rotated by cos, sin (B or 1, T, Dh / 2)."""
    acc = accumulation_dtype(x.dtype)
    cos, sin = cos.to(acc).unsqueeze(-2), sin.to(acc).unsqueeze(-2)
    first, second = x.to(acc).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(q, k) rotated, in plain PyTorch."""
    at = torch.arange(q.shape[1], device=q.device).unsqueeze(0) if positions is None else positions.long()
    cos, sin = cos[at], sin[at]  # (B or 1, T, Dh / 2)
    return _rotate_reference(q, cos, sin), _rotate_reference(k, cos, sin)


def rope_backward_reference(
    dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k from those of the rotated q and k: the rotation by the negative angle."""
    return rope_reference(dq, dk, cos, -sin, positions)


# ---------------------------------------------------------------- Triton


@jit(do_not_specialize=["T", "N_POSITIONS"])
def _rope_kernel(
    q, k, q_out, k_out, cos, sin, positions, T, N_POSITIONS, q_batch, q_token, k_batch, k_token, p_batch, p_token,
    Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, INVERSE: tl.constexpr, BH: tl.constexpr, BKV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    b = n // T
    t = n % T
    at = t
    if HAS_POSITIONS:
        at = tl.load(positions + b * p_batch + t * p_token).to(tl.int64)
    j = tl.arange(0, BLOCK)[None, :]
    everywhere = tl.zeros((1, BLOCK), tl.int64) + at
    inside = (j < HALF) & (everywhere >= 0) & (everywhere < N_POSITIONS)
    c = tl.load(cos + at * HALF + j, mask=inside, other=float("nan")).to(tl.float32)
    s = tl.load(sin + at * HALF + j, mask=inside, other=float("nan")).to(tl.float32)
    if INVERSE:
        s = -s
    h = tl.arange(0, BH)[:, None]
    q_mask = (h < H) & (j < HALF)
    q_in = q + b * q_batch + t * q_token + h * Q_HEAD + j
    q1 = tl.load(q_in, mask=q_mask, other=0.0).to(tl.float32)
    q2 = tl.load(q_in + HALF, mask=q_mask, other=0.0).to(tl.float32)
    g = tl.arange(0, BKV)[:, None]
    k_mask = (g < HKV) & (j < HALF)
    k_in = k + b * k_batch + t * k_token + g * K_HEAD + j
    k1 = tl.load(k_in, mask=k_mask, other=0.0).to(tl.float32)
    k2 = tl.load(k_in + HALF, mask=k_mask, other=0.0).to(tl.float32)
    q_to = q_out + (n * H + h) * (2 * HALF) + j
    tl.store(q_to, (q1 * c - q2 * s).to(q_out.dtype.element_ty), mask=q_mask)
    tl.store(q_to + HALF, (q2 * c + q1 * s).to(q_out.dtype.element_ty), mask=q_mask)
    k_to = k_out + (n * HKV + g) * (2 * HALF) + j
    tl.store(k_to, (k1 * c - k2 * s).to(k_out.dtype.element_ty), mask=k_mask)
    tl.store(k_to + HALF, (k2 * c + k1 * s).to(k_out.dtype.element_ty), mask=k_mask)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """One program a token, q and k together: cos and sin are read once for all heads. One warp for each 512 pairs of
    q."""
    batch, tokens, heads, width = q.shape
    kv_heads, half = k.shape[2], width // 2
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    at = cos if positions is None else positions
    p_strides = (0, 0) if positions is None else positions.stride()
    block, bh = next_power_of_2(half), next_power_of_2(heads)
    if batch * tokens:
        _rope_kernel[(batch * tokens,)](
            q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), at, tokens, len(cos), *q.stride()[:2],
            *k.stride()[:2], *p_strides, q.stride(2), k.stride(2), heads, kv_heads, half, positions is not None,
            inverse, bh, next_power_of_2(kv_heads), block, num_warps=max(1, min(bh * block // 512, 8)),
        )  # fmt: skip
    return q_out, k_out


# ---------------------------------------------------------------- registration


@torch.library.custom_op("fastlm::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    return _launch(q, k, cos, sin, positions, inverse)


def _rope_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    if native.available(q, k) and cos.dtype != torch.float64:
        return native.rope(q, k, cos.float(), sin.float(), positions, inverse)
    return (rope_backward_reference if inverse else rope_reference)(q, k, cos, sin, positions)


cpu_kernel(_rope, _rope_cpu)


@_rope.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup(ctx, inputs, output) -> None:
    _, _, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dq, dk):
    dq, dk = _rope(dq, dk, *ctx.saved_tensors, not ctx.inverse)
    return dq, dk, None, None, None, None


_rope.register_autograd(_backward, setup_context=_setup)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their tokens' positions: out = [x1 cos - x2 sin, x2 cos + x1 sin], x1 and x2 the halves of a
    head.

    q (B, T, H, Dh), k (B, T, Hkv, Dh), any strides with a contiguous last dimension costing no copy; cos, sin
    (max_seq_len, Dh / 2) the angles' cosine and sine, fp32, or fp16 for 16-bit q and k; positions (B, T) integers or None
    for 0 .. T - 1. Returns contiguous tensors in q's and k's dtypes, whatever autocast says. cos, sin and positions get no
    gradient. A position outside cos gives NaN on a GPU and an IndexError on a CPU. Raises ValueError on shapes that do not
    fit.
    Source: Su et al. 2021, equation 34.
    """
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        raise ValueError(
            f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, T, H, Dh) and (B, T, Hkv, Dh) with an even Dh"
        )
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] * 2 != q.shape[3]:
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (max_seq_len, {q.shape[3] // 2})")
    if positions is None and cos.shape[0] < q.shape[1]:
        raise ValueError(f"rope: {q.shape[1]} tokens but cos and sin hold {cos.shape[0]} positions; make the tables longer")
    if positions is not None and positions.shape != q.shape[:2]:
        raise ValueError(f"rope: positions {tuple(positions.shape)} must be (B, T) = {tuple(q.shape[:2])}")
    return _rope(q, k, cos, sin, positions, False)

"""Rotary position embedding on a GPU: q and k in one launch, in whatever strides they come."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.common import next_power_of_2


@triton.jit(do_not_specialize=["T", "N_POSITIONS"])
def rope_kernel(
    q: tl.tensor,  # (B, T, H, 2 HALF) in strides q_batch, q_token, Q_HEAD, 1
    k: tl.tensor,  # (B, T, HKV, 2 HALF) in strides k_batch, k_token, K_HEAD, 1
    q_out: tl.tensor,  # (B, T, H, 2 HALF)
    k_out: tl.tensor,  # (B, T, HKV, 2 HALF)
    cos: tl.tensor,  # (N_POSITIONS, HALF)
    sin: tl.tensor,  # (N_POSITIONS, HALF)
    positions: tl.tensor,  # (B, T) in strides p_batch, p_token
    T: tl.tensor,
    N_POSITIONS: tl.tensor,
    q_batch: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_token: tl.tensor,
    p_batch: tl.tensor,
    p_token: tl.tensor,
    Q_HEAD: tl.constexpr,
    K_HEAD: tl.constexpr,
    H: tl.constexpr,
    HKV: tl.constexpr,
    HALF: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    INVERSE: tl.constexpr,
    BH: tl.constexpr,
    BKV: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
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


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """(q, k) rotated, by the negative angle where inverse.

    One program a token, q and k together: cos and sin are read once for all heads. One warp for
    each 512 pairs of q.
    """
    batch, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    half = width // 2
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    q_out = q.new_empty(q.shape)
    k_out = k.new_empty(k.shape)
    p_batch, p_token = (0, 0) if positions is None else positions.stride()
    block = next_power_of_2(half)
    padded_heads = next_power_of_2(heads)
    if batch * tokens:
        rope_kernel[(batch * tokens,)](
            q=q,
            k=k,
            q_out=q_out,
            k_out=k_out,
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            positions=cos if positions is None else positions,
            T=tokens,
            N_POSITIONS=len(cos),
            q_batch=q.stride(0),
            q_token=q.stride(1),
            k_batch=k.stride(0),
            k_token=k.stride(1),
            p_batch=p_batch,
            p_token=p_token,
            Q_HEAD=q.stride(2),
            K_HEAD=k.stride(2),
            H=heads,
            HKV=kv_heads,
            HALF=half,
            HAS_POSITIONS=positions is not None,
            INVERSE=inverse,
            BH=padded_heads,
            BKV=next_power_of_2(kv_heads),
            BLOCK=block,
            num_warps=max(1, min(padded_heads * block // 512, 8)),
        )
    return q_out, k_out

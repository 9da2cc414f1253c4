"""RMSNorm on a GPU: one pass over memory each way, dw added up in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.common import as_rows, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["M"])
def rms_norm_forward_kernel(
    x: tl.tensor,  # (M, D), rows X_STRIDE apart
    residual: tl.tensor,  # (M, D), rows R_STRIDE apart
    weight: tl.tensor,  # (D,)
    y: tl.tensor,  # (M, D)
    total: tl.tensor,  # (M, D), x + residual
    rstd: tl.tensor,  # (M,)
    M: tl.tensor,
    X_STRIDE: tl.constexpr,
    R_STRIDE: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK)[None, :]
    row = i[:, None]
    mask = (row < M) & (j < D)
    v = tl.load(x + row * X_STRIDE + j, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + row * R_STRIDE + j, mask=mask, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * D + j, rounded, mask=mask)
        v = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(v * v, 1) * (1.0 / D) + EPS)
    w = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32)
    tl.store(y + row * D + j, (v * r[:, None] * w).to(y.dtype.element_ty), mask=mask)
    tl.store(rstd + i, r, mask=i < M)


@triton.jit(do_not_specialize=["M"])
def rms_norm_backward_kernel(
    dy: tl.tensor,  # (M, D), rows DY_STRIDE apart
    x: tl.tensor,  # (M, D), rows X_STRIDE apart
    weight: tl.tensor,  # (D,)
    rstd: tl.tensor,  # (M,)
    dsum: tl.tensor,  # (M, D), rows S_STRIDE apart
    dx: tl.tensor,  # (M, D)
    partial: tl.tensor,  # (PARTIALS, D)
    M: tl.tensor,
    DY_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    S_STRIDE: tl.constexpr,
    D: tl.constexpr,
    HAS_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
    DW_ROWS: tl.constexpr,
) -> None:
    p = tl.program_id(0)
    j = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + j, mask=j < D, other=0.0).to(tl.float32)
    dw = tl.zeros((DW_ROWS, BLOCK), tl.float32)
    for tile in range(p, tl.cdiv(M, ROWS), PARTIALS):
        i = tl.arange(0, ROWS).to(tl.int64) + tile * ROWS
        row = i[:, None]
        mask = (row < M) & (j < D)
        g = tl.load(dy + row * DY_STRIDE + j, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(x + row * X_STRIDE + j, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + i, mask=i < M, other=0.0)[:, None]
        xhat = v * r
        if DW_ROWS == 1:
            dw += tl.sum(g * xhat, 0)[None, :]
        else:
            dw += g * xhat
        g = g * w
        c = tl.sum(g * xhat, 1)[:, None] * (1.0 / D)
        g = (g - xhat * c) * r
        if HAS_SUM:
            g += tl.load(dsum + row * S_STRIDE + j, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row * D + j, g.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + p.to(tl.int64) * D + j, tl.sum(dw, 0)[None, :], mask=j < D)


@triton.jit
def sum_partials_kernel(
    partial: tl.tensor,  # (PARTIALS, D)
    out: tl.tensor,  # (D,)
    D: tl.constexpr,
    PARTIALS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, PARTIALS, ROWS):
        i = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + i * D + j, mask=(i < PARTIALS) & (j < D), other=0.0)
    tl.store(out + j, tl.sum(total, 0)[None, :].to(out.dtype.element_ty), mask=j < D)


def forward_shape(width: int) -> tuple[int, int, int]:
    """(rows of a program, padded width, warps): 32 to 64 numbers to a lane.

    Up to 2048 wide one warp holds whole rows and sums with shuffles alone: no barrier, no shared
    memory.
    """
    block = next_power_of_2(width)
    if block <= 256:
        return 4096 // block, block, 4
    return max(1, 2048 // block), block, block // 1024 if block > 2048 else 1


def backward_shape(width: int) -> tuple[int, int, int]:
    """(rows of a tile, padded width, warps): at most 32 numbers of each operand to a lane.

    More would spill. 2048 wide even 16 do, one architecture or another, hence 8. From 512 wide all
    warps lie along a row, so that dw needs no exchange between them until the end; narrower, each
    warp has rows of its own.
    """
    block = next_power_of_2(width)
    special = {512: (4, 2), 2048: (1, 8), 4096: (1, 8), 8192: (1, 16)}
    rows, warps = special.get(block, (4096 // block, 4))
    return rows, block, warps


def partial_sums(m: int) -> int:
    """Programs of the backward of m rows, each with a (D,) fp32 partial sum of dw.

    Few enough that the partial sums, written and read once, stay under 2% of the traffic, and at
    most 3 for each of an H100's 132 multiprocessors. It depends on the shape alone: dw is
    reproducible.
    """
    return max(1, min(m // 72, 396))


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual, rstd); without a residual the sum is empty."""
    rows = as_rows(x)
    other = rows if residual is None else as_rows(residual)
    m, width = rows.shape
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(0 if residual is None else x.shape)
    tile, block, warps = forward_shape(width)
    if m:
        rms_norm_forward_kernel[(cdiv(m, tile),)](
            x=rows,
            residual=other,
            weight=weight.contiguous(),
            y=y,
            total=total,
            rstd=rstd,
            M=m,
            X_STRIDE=rows.stride(0),
            R_STRIDE=other.stride(0),
            D=width,
            EPS=eps,
            ADD=residual is not None,
            ROWS=tile,
            BLOCK=block,
            num_warps=warps,
        )
    return y, total, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx, dw)."""
    rows = as_rows(x)
    upstream = as_rows(dy)
    other = rows if dsum is None else as_rows(dsum)
    m, width = rows.shape
    dx = x.new_empty(x.shape)
    dw = weight.new_empty(weight.shape)
    tile, block, warps = backward_shape(width)
    count = partial_sums(m)
    partial = x.new_empty((count, width), dtype=torch.float32)
    rms_norm_backward_kernel[(count,)](
        dy=upstream,
        x=rows,
        weight=weight.contiguous(),
        rstd=rstd,
        dsum=other,
        dx=dx,
        partial=partial,
        M=m,
        DY_STRIDE=upstream.stride(0),
        X_STRIDE=rows.stride(0),
        S_STRIDE=other.stride(0),
        D=width,
        HAS_SUM=dsum is not None,
        ROWS=tile,
        BLOCK=block,
        PARTIALS=count,
        DW_ROWS=tile if block < 512 else 1,
        num_warps=warps,
    )
    columns = max(32, 2048 // next_power_of_2(count))
    sum_partials_kernel[(cdiv(width, columns),)](
        partial=partial,
        out=dw,
        D=width,
        PARTIALS=count,
        ROWS=min(64, next_power_of_2(count)),
        BLOCK=columns,
    )
    return dx, dw

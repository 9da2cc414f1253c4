"""RMSNorm, and the residual add in front of it.

    rstd_i = 1 / sqrt(mean_j x_ij^2 + eps)          y_ij = x_ij rstd_i w_j
    with xh_ij = x_ij rstd_i, c_i = mean_j(xh_ij w_j dy_ij):
    dx_ij  = rstd_i (w_j dy_ij - xh_ij c_i) [+ dsum_ij]          dw_j = sum_i dy_ij xh_ij

x, y, dy, dx: (..., D) of any float dtype; w: (D,) of any float dtype; everything is computed in fp32. y has x's
dtype, dw has w's. Saved for the backward: x (or the sum) and rstd (fp32, one per row).
Floor, in bytes per element of size s: forward 2s (with the add 4s), backward 3s (with the sum's gradient 4s; 1s more
where the backward also writes y again, so that a matmul behind the norm need not save it).
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import accumulation_dtype, as_rows, cdiv, cpu_kernel, jit, next_power_of_2, tl


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd) in plain PyTorch; rstd (...,) in the accumulation dtype."""
    acc = accumulation_dtype(x.dtype)
    rstd = torch.rsqrt(x.to(acc).square().mean(-1) + eps)
    y = x.to(acc) * rstd.unsqueeze(-1) * weight.to(acc)
    return y.to(x.dtype).contiguous(), rstd.contiguous()


def rms_norm_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, y) in plain PyTorch."""
    acc = rstd.dtype
    xhat = x.to(acc) * rstd.unsqueeze(-1)
    wdy = weight.to(acc) * dy.to(acc)
    dx = rstd.unsqueeze(-1) * (wdy - xhat * (xhat * wdy).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + dsum.to(acc)
    dw = (dy.to(acc) * xhat).reshape(-1, x.shape[-1]).sum(0)
    y = xhat * weight.to(acc)
    return dx.to(x.dtype).contiguous(), dw.to(weight.dtype), y.to(x.dtype).contiguous()


# ---------------------------------------------------------------- Triton

MAX_WIDTH = 8192  # a row is held in registers; the backward of a wider one would spill


@jit(do_not_specialize=["M"])
def _forward_kernel(
    x, residual, weight, y, total, rstd, M,
    X_STRIDE: tl.constexpr, R_STRIDE: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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


@jit(do_not_specialize=["M"])
def _backward_kernel(
    dy, x, weight, rstd, dsum, dx, partial, y, M,
    DY_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, S_STRIDE: tl.constexpr, D: tl.constexpr,
    HAS_SUM: tl.constexpr, EMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
    DW_ROWS: tl.constexpr,
):  # fmt: skip
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
        if EMIT:
            tl.store(y + row * D + j, (xhat * w).to(y.dtype.element_ty), mask=mask)
        g = g * w
        c = tl.sum(g * xhat, 1)[:, None] * (1.0 / D)
        g = (g - xhat * c) * r
        if HAS_SUM:
            g += tl.load(dsum + row * S_STRIDE + j, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row * D + j, g.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + p.to(tl.int64) * D + j, tl.sum(dw, 0)[None, :], mask=j < D)


@jit()
def _sum_partials_kernel(partial, out, D: tl.constexpr, PARTIALS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, PARTIALS, ROWS):
        i = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + i * D + j, mask=(i < PARTIALS) & (j < D), other=0.0)
    tl.store(out + j, tl.sum(total, 0)[None, :].to(out.dtype.element_ty), mask=j < D)


def _forward_shape(width: int) -> tuple[int, int, int]:
    """(rows of a program, padded width, warps): 32 to 64 numbers to a lane.

    Up to 2048 wide one warp holds whole rows and sums with shuffles alone: no barrier, no shared memory.
    """
    block = next_power_of_2(width)
    if block <= 256:
        return 4096 // block, block, 4
    return max(1, 2048 // block), block, block // 1024 if block > 2048 else 1


def _backward_shape(width: int) -> tuple[int, int, int]:
    """(rows of a tile, padded width, warps): at most 32 numbers of each operand to a lane, more would spill. 2048 wide even 16
    do, one architecture or another, hence 8.

    From 512 wide all warps lie along a row, so that dw needs no exchange between them until the end; narrower, each warp
    has rows of its own.
    """
    block = next_power_of_2(width)
    rows, warps = {512: (4, 2), 2048: (1, 8), 4096: (1, 8), 8192: (1, 16)}.get(block, (4096 // block, 4))
    return rows, block, warps


def _partials(m: int, width: int) -> int:
    """Programs of the backward, each with a (D,) fp32 partial sum of dw: few enough that the partials, written and
    read once, stay under 2% of the traffic, at most 3 for each of an H100's 132 multiprocessors. It depends on the
    shape alone: dw is reproducible.
    """
    return max(1, min(m // 72, 396))


def _launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual, rstd)."""
    rows = as_rows(x)
    m, width = rows.shape
    other = rows if residual is None else as_rows(residual)
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(0 if residual is None else x.shape)
    tile, block, warps = _forward_shape(width)
    if m:
        _forward_kernel[(cdiv(m, tile),)](
            rows, other, weight.contiguous(), y, total, rstd, m, rows.stride(0), other.stride(0), width, eps,
            residual is not None, tile, block, num_warps=warps,
        )  # fmt: skip
    return y, total, rstd


def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, emit_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, y)."""
    rows, grad = as_rows(x), as_rows(dy)
    other = rows if dsum is None else as_rows(dsum)
    m, width = rows.shape
    dx, dw, y = x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape if emit_y else (0,))
    tile, block, warps = _backward_shape(width)
    count = _partials(m, width)
    partial = x.new_empty((count, width), dtype=torch.float32)
    _backward_kernel[(count,)](
        grad, rows, weight.contiguous(), rstd, other, dx, partial, y, m, grad.stride(0), rows.stride(0),
        other.stride(0), width, dsum is not None, emit_y, tile, block, count,
            tile if block < 512 else 1, num_warps=warps,
    )  # fmt: skip
    block = max(32, 2048 // next_power_of_2(count))
    _sum_partials_kernel[(cdiv(width, block),)](partial, dw, width, count, min(64, next_power_of_2(count)), block)
    return dx, dw, y


# ---------------------------------------------------------------- registration


@torch.library.custom_op("fastlm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _launch_forward(x, None, weight, eps)
    return y, rstd


@torch.library.custom_op("fastlm::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, residual, weight, eps)


@torch.library.custom_op("fastlm::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, emit_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_backward(dy, x, weight, rstd, dsum, emit_y)


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if native.available(x):
        y, _, rstd = native.rms_norm(x, None, weight, eps)
        return y, rstd
    return rms_norm_reference(x, weight, eps)


cpu_kernel(_rms_norm, _rms_norm_cpu)


def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if native.available(x, residual):
        return native.rms_norm(x, residual, weight, eps)
    total = (x + residual).contiguous()
    y, rstd = rms_norm_reference(total, weight, eps)
    return y, total, rstd


cpu_kernel(_add_rms_norm, _add_rms_norm_cpu)


def _rms_norm_backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, emit_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if native.available(dy, x) and (dsum is None or dsum.dtype == x.dtype):
        return native.rms_norm_backward(dy, x, weight, rstd, dsum, emit_y)
    dx, dw, y = rms_norm_backward_reference(dy, x, weight, rstd, dsum)
    return dx, dw, y if emit_y else x.new_empty(0)


cpu_kernel(_rms_norm_backward, _rms_norm_backward_cpu)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


@_rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, emit_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape if emit_y else (0,))


def _setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    if dy is None:
        return None, None, None
    dx, dw, _ = _rms_norm_backward(dy, *ctx.saved_tensors, None, False)
    return dx, dw, None


def _add_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _add_backward(ctx, dy, dsum, _):
    if dy is None:
        return dsum, dsum, None, None
    dx, dw, _ = _rms_norm_backward(dy, *ctx.saved_tensors, dsum, False)
    return dx, dx, dw, None


_rms_norm.register_autograd(_backward, setup_context=_setup)
_add_rms_norm.register_autograd(_add_backward, setup_context=_add_setup)


def check_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """Raise for shapes and dtypes that do not fit: ValueError, or TypeError where x and the residual differ in dtype."""
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"rms_norm: x's last dimension is {x.shape[-1]}, expected 1 to {MAX_WIDTH}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},), as wide as x")
    if residual is not None and x.shape != residual.shape:
        raise ValueError(f"add_rms_norm: x has shape {tuple(x.shape)}, residual {tuple(residual.shape)}, expected the same")
    if residual is not None and x.dtype != residual.dtype:
        raise TypeError(f"add_rms_norm: x is {x.dtype}, residual {residual.dtype}, expected the same")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * weight.

    x (..., D), weight (D,); y (..., D) in x's dtype whatever autocast says, computed in fp32. Raises ValueError on a
    shape that does not fit. Source: Zhang and Sennrich 2019, equation 4.
    """
    check_norm(x, weight)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass: the sum is rounded to x's dtype before it is normalised.

    x, residual (..., D) of one shape and dtype, weight (D,); both results (..., D) in x's dtype. Raises ValueError or
    TypeError on shapes or dtypes that do not fit.
    """
    check_norm(x, weight, residual)
    y, total, _ = _add_rms_norm(x, residual, weight, eps)
    return y, total

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

from fastlm.kernels import cpu
from fastlm.kernels.common import accumulation_dtype


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


# ---------------------------------------------------------------- registration


@torch.library.custom_op("fastlm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rms_norm_reference(x, weight, eps)


@torch.library.custom_op("fastlm::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _add_rms_norm_cpu(x, residual, weight, eps)


@torch.library.custom_op("fastlm::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, emit_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _rms_norm_backward_cpu(dy, x, weight, rstd, dsum, emit_y)


@_rms_norm.register_kernel("cpu")
def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if cpu.available(x):
        y, _, rstd = cpu.rms_norm(x, None, weight, eps)
        return y, rstd
    return rms_norm_reference(x, weight, eps)


@_add_rms_norm.register_kernel("cpu")
def _add_rms_norm_cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if cpu.available(x, residual):
        return cpu.rms_norm(x, residual, weight, eps)
    total = (x + residual).contiguous()
    y, rstd = rms_norm_reference(total, weight, eps)
    return y, total, rstd


@_rms_norm_backward.register_kernel("cpu")
def _rms_norm_backward_cpu(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, emit_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if cpu.available(dy, x) and (dsum is None or dsum.dtype == x.dtype):
        return cpu.rms_norm_backward(dy, x, weight, rstd, dsum, emit_y)
    dx, dw, y = rms_norm_backward_reference(dy, x, weight, rstd, dsum)
    return dx, dw, y if emit_y else x.new_empty(0)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


@_rms_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, emit_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
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


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},), x's last dimension"
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * weight.

    x (..., D), weight (D,); y (..., D) in x's dtype whatever autocast says, computed in fp32. Raises ValueError on a
    shape that does not fit. Source: Zhang and Sennrich 2019, equation 4.
    """
    _check(x, weight)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass: the sum is rounded to x's dtype before it is normalised.

    x, residual (..., D) of one shape and dtype, weight (D,); both results (..., D) in x's dtype. Raises ValueError or
    TypeError on shapes or dtypes that do not fit.
    """
    _check(x, weight)
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rms_norm: x has shape {tuple(x.shape)}, residual {tuple(residual.shape)}; they must be equal"
        )
    if x.dtype != residual.dtype:
        raise TypeError(f"add_rms_norm: x is {x.dtype}, residual {residual.dtype}; they must be equal")
    y, total, _ = _add_rms_norm(x, residual, weight, eps)
    return y, total

"""RMSNorm, and the residual add in front of it.

    rstd_i = 1 / sqrt(mean_j x_ij^2 + eps)          y_ij = x_ij rstd_i w_j
    with xh_ij = x_ij rstd_i, c_i = mean_j(xh_ij w_j dy_ij):
    dx_ij  = rstd_i (w_j dy_ij - xh_ij c_i) [+ dsum_ij]          dw_j = sum_i dy_ij xh_ij

x, y, dy, dx: (..., D) of any float dtype; w: (D,) of any float dtype; everything is computed in
fp32. y has x's dtype, dw has w's. Saved for the backward: x (or the sum) and rstd (fp32, one per
row).
Floor, in bytes per element of size s: forward 2s (with the add 4s), backward 3s (with the sum's
gradient 4s).
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import accumulation_dtype, call_directly_on_cpu, takes_triton

MAX_WIDTH = 8192  # the Triton kernels hold a row in registers; a wider one would spill


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd) in plain PyTorch; rstd (...,) in the accumulation dtype."""
    acc = accumulation_dtype(x.dtype)
    rstd = torch.rsqrt(x.to(acc).square().mean(-1) + eps)
    y = x.to(acc) * rstd.unsqueeze(-1) * weight.to(acc)
    return y.to(x.dtype).contiguous(), rstd.contiguous()


def rms_norm_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx, dw) in plain PyTorch."""
    acc = rstd.dtype
    xhat = x.to(acc) * rstd.unsqueeze(-1)
    wdy = weight.to(acc) * dy.to(acc)
    dx = rstd.unsqueeze(-1) * (wdy - xhat * (xhat * wdy).mean(-1, keepdim=True))
    if dsum is not None:
        dx = dx + dsum.to(acc)
    dw = (dy.to(acc) * xhat).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dw.to(weight.dtype)


@torch.library.custom_op("fastlm::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd)."""
    if takes_triton(x):
        from fastlm.kernels.triton import rms_norm as on_gpu

        y, _, rstd = on_gpu.forward(x, None, weight, eps)
        return y, rstd
    if native.available(x):
        y, _, rstd = native.rms_norm(x, None, weight, eps)
        return y, rstd
    return rms_norm_reference(x, weight, eps)


@torch.library.custom_op("fastlm::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual, rstd)."""
    if takes_triton(x):
        from fastlm.kernels.triton import rms_norm as on_gpu

        return on_gpu.forward(x, residual, weight, eps)
    if native.available(x, residual):
        return native.rms_norm(x, residual, weight, eps)
    total = (x + residual).contiguous()
    y, rstd = rms_norm_reference(total, weight, eps)
    return y, total, rstd


@torch.library.custom_op("fastlm::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx, dw)."""
    if takes_triton(x):
        from fastlm.kernels.triton import rms_norm as on_gpu

        return on_gpu.backward(dy, x, weight, rstd, dsum)
    if native.available(dy, x) and (dsum is None or dsum.dtype == x.dtype):
        return native.rms_norm_backward(dy, x, weight, rstd, dsum)
    return rms_norm_backward_reference(dy, x, weight, rstd, dsum)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), rstd


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


@_rms_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _drstd: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    dx, dw = _rms_norm_backward(dy, *ctx.saved_tensors, None)
    return dx, dw, None


def _add_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _ = inputs
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_backward(
    ctx: Any, dy: Tensor | None, dsum: Tensor | None, _drstd: None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return dsum, dsum, None, None
    dx, dw = _rms_norm_backward(dy, *ctx.saved_tensors, dsum)
    return dx, dx, dw, None


_rms_norm.register_autograd(_backward, setup_context=_save)
_add_rms_norm.register_autograd(_add_backward, setup_context=_add_save)
for op in (_rms_norm, _add_rms_norm, _rms_norm_backward):
    call_directly_on_cpu(op)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    """Raise ValueError for shapes that do not fit, TypeError for two dtypes of x and residual."""
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        width = x.shape[-1]
        raise ValueError(f"rms_norm: x's last dimension is {width}, expected 1 to {MAX_WIDTH}")
    if weight.shape != x.shape[-1:]:
        expected = f"expected ({x.shape[-1]},), as wide as x"
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, {expected}")
    if residual is not None and x.shape != residual.shape:
        shapes = f"x has shape {tuple(x.shape)}, residual {tuple(residual.shape)}"
        raise ValueError(f"add_rms_norm: {shapes}, expected the same")
    if residual is not None and x.dtype != residual.dtype:
        dtypes = f"x is {x.dtype}, residual {residual.dtype}"
        raise TypeError(f"add_rms_norm: {dtypes}, expected the same")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * weight.

    x (..., D), weight (D,); y (..., D) in x's dtype whatever autocast says, computed in fp32.
    Raises ValueError on a shape that does not fit. Source: Zhang and Sennrich 2019, equation 4.
    """
    _check(x, weight)
    if native.direct(x):
        return native.rms_norm(x, None, weight, eps)[0]
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass.

    The sum is rounded to x's dtype before it is normalised. x, residual (..., D) of one shape and
    dtype, weight (D,); both results (..., D) in x's dtype. Raises ValueError or TypeError on shapes
    or dtypes that do not fit.
    """
    _check(x, weight, residual)
    if native.direct(x):
        return native.rms_norm(x, residual, weight, eps)[:2]
    y, total, _ = _add_rms_norm(x, residual, weight, eps)
    return y, total

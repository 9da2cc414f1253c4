"""A matmul behind a norm or behind SwiGLU, whose input is made again in the backward instead of being saved.

    z = rms_norm(x) W^T          z = silu(gate) up W^T

dW = dz^T y needs y, the matmul's input. The backward kernels of the norm and of SwiGLU read all that y is made of
anyway, so they write it a second time (1 element a token and channel) and the forward saves nothing but their own
inputs. That trades one write in the backward for y's memory through the whole step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels.common import matmul_dtype
from fastlm.kernels.rms_norm import _add_rms_norm, _rms_norm, _rms_norm_backward, check_norm
from fastlm.kernels.swiglu import _swiglu, _swiglu_backward


def _weight_gradient(dz: Tensor, y: Tensor) -> Tensor:
    """dz^T y over all tokens: dz (..., O), y (..., D)."""
    return dz.flatten(0, -2).t() @ y.to(dz.dtype).flatten(0, -2)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, eps, weight):
        if residual is None:
            total = x
            y, rstd = _rms_norm(x, norm_weight, eps)
        else:
            y, total, rstd = _add_rms_norm(x, residual, norm_weight, eps)
        ctx.save_for_backward(total, norm_weight, rstd, weight)
        ctx.added = residual is not None
        z = F.linear(y.to(weight.dtype), weight)
        return (z, total) if ctx.added else z

    @staticmethod
    def backward(ctx, dz, dsum=None):
        total, norm_weight, rstd, weight = ctx.saved_tensors
        dx, dnorm, y = _rms_norm_backward(dz @ weight, total, norm_weight, rstd, dsum, True)
        return dx, dx if ctx.added else None, dnorm, None, _weight_gradient(dz, y)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight):
        ctx.save_for_backward(gate_up, weight)
        return F.linear(_swiglu(gate_up).to(weight.dtype), weight)

    @staticmethod
    def backward(ctx, dz):
        gate_up, weight = ctx.saved_tensors
        dgate_up, y = _swiglu_backward(dz @ weight, gate_up, True)
        return dgate_up, _weight_gradient(dz, y)


def rms_norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    """rms_norm(x) W^T without saving rms_norm(x): z = (x / sqrt(mean(x^2) + eps) * norm_weight) W^T.

    x (..., D), norm_weight (D,), weight (O, D); z (..., O) in x's dtype, or autocast's. Raises ValueError on shapes that
    do not fit.
    """
    check_norm(x, norm_weight)
    return _NormLinear.apply(x, None, norm_weight, eps, weight.to(matmul_dtype(x)))


def add_rms_norm_linear(x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual) W^T, x + residual) without saving the norm's output.

    x, residual (..., D) of one shape and dtype, norm_weight (D,), weight (O, D); the product (..., O) in x's dtype or
    autocast's, the sum in x's. Raises ValueError or TypeError on shapes or dtypes that do not fit.
    """
    check_norm(x, norm_weight, residual)
    return _NormLinear.apply(x, residual, norm_weight, eps, weight.to(matmul_dtype(x)))


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """swiglu(gate_up) W^T without saving swiglu(gate_up): z = (silu(gate) * up) W^T.

    gate_up (..., 2F), gate first; weight (O, F); z (..., O) in gate_up's dtype, or autocast's. Raises ValueError on
    shapes that do not fit.
    """
    if gate_up.shape[-1] != 2 * weight.shape[1]:
        raise ValueError(f"swiglu_linear: gate_up is {gate_up.shape[-1]} wide, expected {2 * weight.shape[1]}, twice weight's")
    return _SwigluLinear.apply(gate_up, weight.to(matmul_dtype(gate_up)))

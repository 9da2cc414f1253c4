"""Linear layers that keep less and move less: fp32 weight gradients, outputs in parts.

    z = x W^T          z = silu(gate) up W^T
    dx = dz W          dW = dz^T x

W is cast to the matmul's dtype inside; dW comes straight from the matmul's fp32 accumulator in W's
dtype, so under autocast it is neither rounded to 16 bits nor cast by a kernel of its own. With
sizes, z's columns come as tensors that own their memory, so that their gradients need no
concatenation and a rotated q does not keep the packed projection alive.

dW needs the matmul's input. The backward kernel of SwiGLU reads all that it is made of anyway, so
it can write it a second time (1 element a token and channel), and the forward saves nothing but its
own input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import accumulation_dtype, call_directly_on_cpu, matmul_dtype
from fastlm.kernels.swiglu import _swiglu, _swiglu_backward, swiglu


@torch.library.custom_op("fastlm::input_gradient", mutates_args=())
def _input_gradient(dz: Sequence[Tensor], weight: Tensor) -> Tensor:
    """sum_i dz_i W_i, (M, D), of dz_i (M, O_i) and the rows W_i of weight, added up in place."""
    parts = weight.split([z.shape[1] for z in dz])
    dx = dz[0] @ parts[0]
    for z, w in zip(dz[1:], parts[1:], strict=True):
        dx.addmm_(z, w)
    return dx


@torch.library.custom_op("fastlm::weight_gradient", mutates_args=())
def _weight_gradient(dz: Sequence[Tensor], x: Tensor) -> Tensor:
    """dz_i^T x one below the other, (O, D) in fp32 (or fp64), of dz_i (M, O_i), x (M, D)."""
    acc = accumulation_dtype(x.dtype)
    sizes = [z.shape[1] for z in dz]
    out = torch.empty(sum(sizes), x.shape[1], dtype=acc, device=x.device)
    for z, part in zip(dz, out.split(sizes), strict=True):
        if x.dtype == acc:
            torch.mm(z.t(), x, out=part)
        elif x.is_cuda:
            torch.mm(z.t(), x, out_dtype=acc, out=part)
        else:
            torch.mm(z.t().to(acc), x.to(acc), out=part)
    return out


call_directly_on_cpu(_input_gradient)
call_directly_on_cpu(_weight_gradient)


@_input_gradient.register_fake
def _(dz: Sequence[Tensor], weight: Tensor) -> Tensor:
    return dz[0].new_empty(dz[0].shape[0], weight.shape[1])


@_weight_gradient.register_fake
def _(dz: Sequence[Tensor], x: Tensor) -> Tensor:
    rows = sum(z.shape[1] for z in dz)
    return x.new_empty(rows, x.shape[1], dtype=accumulation_dtype(x.dtype))


# Up to so many, the native kernel is faster than the BLAS library (160 and 198 ms at 32 rows of
# SmolLM2-135M).
FEW_ROWS = 32


def _infer(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in inference mode; with few rows the work is to read W, which native code does once."""
    plain = native.direct(x) and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    if plain and x.numel() <= FEW_ROWS * weight.shape[1] and weight.is_contiguous():
        return native.few_rows_linear(x, weight)
    dtype = matmul_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype))


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, sizes: list[int]
    ) -> Tensor | tuple[Tensor, ...]:
        w = weight.to(dtype)
        x = x.to(dtype)
        ctx.save_for_backward(x, w)
        ctx.weight_dtype = weight.dtype
        if len(sizes) > 1:
            return tuple(F.linear(x, part) for part in w.split(sizes))
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, *dz: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, w = ctx.saved_tensors
        flat = [_flat(z) for z in dz]
        dx = _input_gradient(flat, w).view(x.shape) if len(dz) > 1 else dz[0] @ w
        dw = _weight_gradient(flat, _flat(x)).to(ctx.weight_dtype)
        return dx, dw, None, None


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, weight: Tensor, dtype: torch.dtype, keep_product: bool
    ) -> Tensor:
        w = weight.to(dtype)
        y = _swiglu(gate_up).to(dtype)
        ctx.save_for_backward(gate_up, w, y if keep_product else None)
        ctx.weight_dtype = weight.dtype
        return F.linear(y, w)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate_up, w, y = ctx.saved_tensors
        dgate_up, again = _swiglu_backward(dz @ w, gate_up, y is None)
        if y is None:
            y = again.to(dz.dtype)
        dw = _weight_gradient([_flat(dz)], _flat(y)).to(ctx.weight_dtype)
        return dgate_up, dw, None, None


@overload
def linear(x: Tensor, weight: Tensor, sizes: None = None) -> Tensor: ...
@overload
def linear(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]: ...
def linear(
    x: Tensor, weight: Tensor, sizes: Sequence[int] | None = None
) -> Tensor | tuple[Tensor, ...]:
    """x W^T, or with sizes its columns as that many tensors that own their memory.

    In inference mode they are views of one.

    x (..., D), weight (O, D), sizes summing to O; z (..., O), or one (..., size) each, in x's dtype
    or autocast's. dW is never rounded below fp32. Raises ValueError on shapes that do not fit.
    """
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        shapes = f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"linear: {shapes} must be (..., D) and (O, D)")
    if sizes is not None and sum(sizes) != weight.shape[0]:
        expected = f"expected {weight.shape[0]}, weight's rows"
        raise ValueError(f"linear: sizes {tuple(sizes)} add up to {sum(sizes)}, {expected}")
    if native.inference():  # one matmul, its columns as views
        z = _infer(x, weight)
        return z if sizes is None else z.split(list(sizes), -1)
    parts = [len(weight)] if sizes is None else list(sizes)
    return _Linear.apply(x, weight, matmul_dtype(x), parts)


def swiglu_linear(gate_up: Tensor, weight: Tensor, keep_product: bool = False) -> Tensor:
    """swiglu(gate_up) W^T: z = (silu(gate) * up) W^T.

    gate_up (..., 2F), gate first; weight (O, F); z (..., O) in gate_up's dtype, or autocast's.
    keep_product: save swiglu(gate_up) for the backward, F numbers a row, which otherwise writes it
    again; the same bits either way. Raises ValueError on shapes that do not fit.
    """
    if gate_up.shape[-1] != 2 * weight.shape[1]:
        expected = f"expected {2 * weight.shape[1]}, twice weight's"
        raise ValueError(f"swiglu_linear: gate_up is {gate_up.shape[-1]} wide, {expected}")
    if native.inference():
        return _infer(swiglu(gate_up), weight)
    return _SwigluLinear.apply(gate_up, weight, matmul_dtype(gate_up), keep_product)

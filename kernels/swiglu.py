"""SwiGLU of a packed projection: no chunk, no cat.

    gate_up = [g, u]          y = silu(g) u = g sigmoid(g) u
    with s = sigmoid(g):  dg = dy u s (1 + g (1 - s))          du = dy g s

gate_up: (..., 2F), gate first; y, dy: (..., F). Any float dtype; computed in fp32, results in
gate_up's dtype. Saved for the backward: gate_up. Floor, in elements per element of y: forward 2
read, 1 written; backward 3 read, 2 written (1 more where the backward also writes y again, so that
the down projection need not save it).
Source: Shazeer, GLU Variants Improve Transformer, 2020, equation 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import accumulation_dtype, call_directly_on_cpu, takes_triton


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in plain PyTorch."""
    gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_backward_reference(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up in plain PyTorch."""
    acc = accumulation_dtype(gate_up.dtype)
    gate, up = gate_up.to(acc).chunk(2, -1)
    s = torch.sigmoid(gate)
    dgate = dy.to(acc) * up * s * (1 + gate * (1 - s))
    return torch.cat((dgate, dy.to(acc) * gate * s), -1).to(gate_up.dtype)


@torch.library.custom_op("fastlm::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    if takes_triton(gate_up):
        from fastlm.kernels.triton import swiglu as on_gpu

        return on_gpu.forward(gate_up)
    return native.swiglu(gate_up) if native.available(gate_up) else swiglu_reference(gate_up)


@torch.library.custom_op("fastlm::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate_up: Tensor, emit_y: bool) -> tuple[Tensor, Tensor]:
    """(dgate_up, y again where emit_y, otherwise empty)."""
    if takes_triton(gate_up):
        from fastlm.kernels.triton import swiglu as on_gpu

        return on_gpu.backward(dy, gate_up, emit_y)
    if native.available(dy, gate_up):
        return native.swiglu_backward(dy, gate_up, emit_y)
    y = swiglu_reference(gate_up) if emit_y else gate_up.new_empty(0)
    return swiglu_backward_reference(dy, gate_up), y


def _product_shape(gate_up: Tensor) -> tuple[int, ...]:
    return (*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(_product_shape(gate_up))


@_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor, emit_y: bool) -> tuple[Tensor, Tensor]:
    y = gate_up.new_empty(_product_shape(gate_up) if emit_y else (0,))
    return gate_up.new_empty(gate_up.shape), y


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    dgate_up, _ = _swiglu_backward(dy, gate_up, False)
    return dgate_up


_swiglu.register_autograd(_backward, setup_context=_save)
call_directly_on_cpu(_swiglu)
call_directly_on_cpu(_swiglu_backward)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a packed tensor: y = g sigmoid(g) u with gate_up = [g, u].

    gate_up (..., 2F), gate first; y (..., F) in gate_up's dtype whatever autocast says, computed in
    fp32. Raises ValueError on an odd width. Source: Shazeer 2020, equation 5.
    """
    if gate_up.shape[-1] % 2:
        width = gate_up.shape[-1]
        raise ValueError(
            f"swiglu: gate_up has an odd last dimension, {width}; expected 2F, gate first"
        )
    return native.swiglu(gate_up) if native.direct(gate_up) else _swiglu(gate_up)

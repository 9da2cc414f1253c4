"""SwiGLU of a packed projection: no chunk, no cat.

    gate_up = [g, u]          y = silu(g) u = g sigmoid(g) u
    with s = sigmoid(g):  dg = dy u s (1 + g (1 - s))          du = dy g s

gate_up: (..., 2F), gate first; y, dy: (..., F). Any float dtype; computed in fp32, results in gate_up's dtype.
Saved for the backward: gate_up. Floor, in elements per element of y: forward 2 read, 1 written; backward 3 read, 2
written (1 more where the backward also writes y again, so that the down projection need not save it).
Source: Shazeer, GLU Variants Improve Transformer, 2020, equation 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import accumulation_dtype, as_rows, cdiv, cpu_kernel, jit, next_power_of_2, tl


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


# ---------------------------------------------------------------- Triton


@jit(do_not_specialize=["M"])
def _forward_kernel(gate_up, y, M, STRIDE: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < M) & (j < F)
    gate = tl.load(gate_up + row * STRIDE + j, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * STRIDE + F + j, mask=mask, other=0.0).to(tl.float32)
    silu = gate * (1.0 / (1.0 + tl.exp(-gate)))  # rounded as in the backward, which may write the product again
    tl.store(y + row * F + j, (silu * up).to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["M"])
def _backward_kernel(
    dy, gate_up, dgate_up, y, M, DY_STRIDE: tl.constexpr, STRIDE: tl.constexpr, F: tl.constexpr,
    EMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < M) & (j < F)
    gate = tl.load(gate_up + row * STRIDE + j, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * STRIDE + F + j, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy + row * DY_STRIDE + j, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = g * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dgate_up + row * (2 * F) + j, dgate.to(dgate_up.dtype.element_ty), mask=mask)
    tl.store(dgate_up + row * (2 * F) + F + j, (g * silu).to(dgate_up.dtype.element_ty), mask=mask)
    if EMIT:
        tl.store(y + row * F + j, (silu * up).to(y.dtype.element_ty), mask=mask)


def _half(gate_up: Tensor) -> tuple[int, ...]:
    return (*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a program: 2048 products, 16 for each lane of 4 warps, so two 16-byte loads of each bf16
    operand."""
    block = min(2048, next_power_of_2(width))
    return 2048 // block, block


def _launch_forward(gate_up: Tensor) -> Tensor:
    rows = as_rows(gate_up)
    m, width = len(rows), rows.shape[1] // 2
    y = gate_up.new_empty(_half(gate_up))
    tile, block = _tile(width)
    if y.numel():
        _forward_kernel[(cdiv(m, tile), cdiv(width, block))](rows, y, m, rows.stride(0), width, tile, block, num_warps=4)
    return y


def _launch_backward(dy: Tensor, gate_up: Tensor, emit_y: bool) -> tuple[Tensor, Tensor]:
    rows, grad = as_rows(gate_up), as_rows(dy)
    m, width = len(rows), rows.shape[1] // 2
    dgate_up, y = gate_up.new_empty(gate_up.shape), gate_up.new_empty(_half(gate_up) if emit_y else (0,))
    tile, block = _tile(width)
    if grad.numel():
        _backward_kernel[(cdiv(m, tile), cdiv(width, block))](
            grad, rows, dgate_up, y, m, grad.stride(0), rows.stride(0), width, emit_y, tile, block, num_warps=4
        )
    return dgate_up, y


# ---------------------------------------------------------------- registration


@torch.library.custom_op("fastlm::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor) -> Tensor:
    return _launch_forward(gate_up)


@torch.library.custom_op("fastlm::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, gate_up: Tensor, emit_y: bool) -> tuple[Tensor, Tensor]:
    return _launch_backward(dy, gate_up, emit_y)


def _swiglu_cpu(gate_up: Tensor) -> Tensor:
    return native.swiglu(gate_up) if native.available(gate_up) else swiglu_reference(gate_up)


cpu_kernel(_swiglu, _swiglu_cpu)


def _swiglu_backward_cpu(dy: Tensor, gate_up: Tensor, emit_y: bool) -> tuple[Tensor, Tensor]:
    if native.available(dy, gate_up):
        return native.swiglu_backward(dy, gate_up, emit_y)
    return swiglu_backward_reference(dy, gate_up), swiglu_reference(gate_up) if emit_y else gate_up.new_empty(0)


cpu_kernel(_swiglu_backward, _swiglu_backward_cpu)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(_half(gate_up))


@_swiglu_backward.register_fake
def _(dy: Tensor, gate_up: Tensor, emit_y: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(_half(gate_up) if emit_y else (0,))


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx, dy):
    return _swiglu_backward(dy, ctx.saved_tensors[0], False)[0]


_swiglu.register_autograd(_backward, setup_context=_setup)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a packed tensor: y = g sigmoid(g) u with gate_up = [g, u].

    gate_up (..., 2F), gate first; y (..., F) in gate_up's dtype whatever autocast says, computed in fp32. Raises
    ValueError on an odd width. Source: Shazeer 2020, equation 5.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up has an odd last dimension, {gate_up.shape[-1]}; expected 2F, gate first")
    return _swiglu(gate_up)

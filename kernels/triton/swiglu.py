"""SwiGLU on a GPU: gate and up from one packed row, the sigmoid computed again in the backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.common import as_rows, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["M"])
def swiglu_forward_kernel(
    gate_up: tl.tensor,  # (M, 2 F), rows STRIDE apart
    y: tl.tensor,  # (M, F)
    M: tl.tensor,
    STRIDE: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < M) & (j < F)
    gate = tl.load(gate_up + row * STRIDE + j, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * STRIDE + F + j, mask=mask, other=0.0).to(tl.float32)
    # rounded as in the backward, which may write the product again
    silu = gate * (1.0 / (1.0 + tl.exp(-gate)))
    tl.store(y + row * F + j, (silu * up).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def swiglu_backward_kernel(
    dy: tl.tensor,  # (M, F), rows DY_STRIDE apart
    gate_up: tl.tensor,  # (M, 2 F), rows STRIDE apart
    dgate_up: tl.tensor,  # (M, 2 F)
    y: tl.tensor,  # (M, F), written where EMIT
    M: tl.tensor,
    DY_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    F: tl.constexpr,
    EMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < M) & (j < F)
    gate = tl.load(gate_up + row * STRIDE + j, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * STRIDE + F + j, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(dy + row * DY_STRIDE + j, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dgate = g * up * (sigmoid + silu * (1.0 - sigmoid))
    to = dgate_up + row * (2 * F) + j
    tl.store(to, dgate.to(dgate_up.dtype.element_ty), mask=mask)
    tl.store(to + F, (g * silu).to(dgate_up.dtype.element_ty), mask=mask)
    if EMIT:
        tl.store(y + row * F + j, (silu * up).to(y.dtype.element_ty), mask=mask)


def tile_of(width: int) -> tuple[int, int]:
    """(rows, columns) of a program: 2048 products, 16 for each lane of 4 warps.

    So each lane has two 16-byte loads of each bf16 operand.
    """
    block = min(2048, next_power_of_2(width))
    return 2048 // block, block


def forward(gate_up: Tensor) -> Tensor:
    """y (..., F) of gate_up (..., 2F)."""
    rows = as_rows(gate_up)
    m = len(rows)
    width = rows.shape[1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    tile, block = tile_of(width)
    if y.numel():
        swiglu_forward_kernel[(cdiv(m, tile), cdiv(width, block))](
            gate_up=rows,
            y=y,
            M=m,
            STRIDE=rows.stride(0),
            F=width,
            ROWS=tile,
            BLOCK=block,
            num_warps=4,
        )
    return y


def backward(dy: Tensor, gate_up: Tensor, emit_y: bool) -> tuple[Tensor, Tensor]:
    """(dgate_up, y again where emit_y, otherwise empty)."""
    rows = as_rows(gate_up)
    upstream = as_rows(dy)
    m = len(rows)
    width = rows.shape[1] // 2
    dgate_up = gate_up.new_empty(gate_up.shape)
    y = gate_up.new_empty((*gate_up.shape[:-1], width) if emit_y else (0,))
    tile, block = tile_of(width)
    if upstream.numel():
        swiglu_backward_kernel[(cdiv(m, tile), cdiv(width, block))](
            dy=upstream,
            gate_up=rows,
            dgate_up=dgate_up,
            y=y,
            M=m,
            DY_STRIDE=upstream.stride(0),
            STRIDE=rows.stride(0),
            F=width,
            EMIT=emit_y,
            ROWS=tile,
            BLOCK=block,
            num_warps=4,
        )
    return dgate_up, y

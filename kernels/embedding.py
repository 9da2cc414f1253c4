"""Rows of a table by token id, with a gradient that is the same bit for bit on every run.

    y_n = W[ids_n]          dW_v = sum over n with ids_n = v of dy_n, in order of n

ids: any shape, int64; W: (V, D); y: (..., D) in W's dtype; dW in fp32 (fp64 for fp64).
torch.compile writes the backward of F.embedding as atomic additions, whose order, and so whose
rounding, changes from run to run on any device with more than one thread; PyTorch's own operator
sorts the ids (GPU) or gives each thread its own rows (CPU). As one opaque operator it stays that in
a compiled step. It moves what it must: the rows once in each direction, and dW once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlm.kernels.common import accumulation_dtype, call_directly_on_cpu


def embedding_reference(ids: Tensor, weight: Tensor) -> Tensor:
    """Row by row."""
    return torch.stack([weight[i] for i in ids.flatten()]).view(*ids.shape, weight.shape[1])


@torch.library.custom_op("fastlm::embedding", mutates_args=())
def _embedding(ids: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(ids, weight)


@torch.library.custom_op("fastlm::embedding_backward", mutates_args=())
def _embedding_backward(dy: Tensor, ids: Tensor, rows: int) -> Tensor:
    dy = dy.to(accumulation_dtype(dy.dtype))
    return torch.ops.aten.embedding_dense_backward(dy, ids, rows, -1, False)


call_directly_on_cpu(_embedding)
call_directly_on_cpu(_embedding_backward)


@_embedding.register_fake
def _(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@_embedding_backward.register_fake
def _(dy: Tensor, ids: Tensor, rows: int) -> Tensor:
    return dy.new_empty(rows, dy.shape[-1], dtype=accumulation_dtype(dy.dtype))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ids, weight = inputs
    ctx.save_for_backward(ids)
    ctx.rows = weight.shape[0]
    ctx.dtype = weight.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
    (ids,) = ctx.saved_tensors
    return None, _embedding_backward(dy, ids, ctx.rows).to(ctx.dtype)


_embedding.register_autograd(_backward, setup_context=_save)


def _check_table(weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight has shape {tuple(weight.shape)}, expected (V, D)")


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dhead: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, dhead.contiguous().index_add_(0, ids.flatten(), dy.flatten(0, -2))


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids]: ids (...) int64 within [0, V), weight (V, D); (..., D).

    Raises ValueError where weight is not (V, D).
    """
    _check_table(weight)
    return _embedding(ids, weight)


def tied_embedding(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """embedding(ids, weight), and weight for a head that shares it.

    dW_v = dhead_v + the sum of dy_n, in dhead's own memory. On a CPU that spares two more blocks of
    (V, D), zeroed, filled and added. For a head that makes a gradient of its own, as matmuls do.
    Compiled, and elsewhere, it is embedding(ids, weight) and weight itself. Raises ValueError as
    embedding does.
    """
    _check_table(weight)
    exact = accumulation_dtype(weight.dtype) == weight.dtype
    if torch.compiler.is_compiling() or weight.device.type != "cpu" or not exact:
        return _embedding(ids, weight), weight
    return _Tied.apply(ids, weight)

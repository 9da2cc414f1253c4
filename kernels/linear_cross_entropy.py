"""Cross-entropy behind the head's matmul, without ever holding the (N, V) logits.

    loss = cross_entropy(h W^T (+ bias), targets)
    dh = dlogits W          dW = dlogits^T h          dbias = sum of dlogits' rows

h: (N, D); W: (V, D); bias: (V,). The matmuls run in h's dtype (autocast's, where it is on); loss
and lse are fp32. The loops over chunks of rows are in head_chunks.py.
"sum" and "mean": the forward leaves dh and dW ready, so that a step takes 3 matmuls; the backward
scales them. "none" (and linear_logprobs): the forward keeps lse, the backward makes each chunk's
logits again: 4 matmuls. Where keep_bytes allows it, logits are kept and not made again: between 3
and 4 matmuls.
Beside the matmuls, in chunk-of-logits-sized passes: 2 reads and 1 write in the fused forward; 1
read in a forward alone, 1 read and 1 write in the recomputing backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import head_chunks
from fastlm.kernels.common import accumulation_dtype, call_directly_on_cpu, matmul_dtype
from fastlm.kernels.loss_options import LossOptions, mean_over_counted

# The operators below take numbers alone. options: LossOptions.flat(). chunk_bytes: 0 for what suits
# the device. max_counted: -1 where not known. That makes them longer than functions should be.


@torch.library.custom_op("fastlm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Sequence[float],
    chunk_bytes: int,
    max_counted: int,
    need_dh: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the sum of the rows' losses, and its dh, dW, dbias), gradients not needed empty."""
    of_rows = LossOptions.of(options)
    head = head_chunks.head_of(h, weight, bias, targets, of_rows.ignore_index, max_counted)
    loss, gradients = head_chunks.loss_and_gradients(head, of_rows, chunk_bytes, need_dh, need_dw)
    return loss.sum(), *gradients.of_all_rows(head)


@torch.library.custom_op("fastlm::linear_nll", mutates_args=())
def _linear_nll(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Sequence[float],
    chunk_bytes: int,
    max_counted: int,
    kept_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse) of each row, and the first kept_rows of logits, as far as whole chunks go."""
    of_rows = LossOptions.of(options)
    head = head_chunks.head_of(h, weight, bias, targets, of_rows.ignore_index, max_counted)
    kept = head_chunks.room(h, kept_rows, len(weight))
    loss, lse = head_chunks.forward(head, of_rows, chunk_bytes, kept)
    return loss, lse, kept


@torch.library.custom_op("fastlm::linear_nll_backward", mutates_args=())
def _linear_nll_backward(
    dloss: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    kept: Tensor,
    options: Sequence[float],
    chunk_bytes: int,
    max_counted: int,
    need_dh: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dW, dbias) from the gradients of the rows' losses, those not needed empty."""
    of_rows = LossOptions.of(options)
    head = head_chunks.head_of(h, weight, bias, targets, of_rows.ignore_index, max_counted)
    gradients = head_chunks.Gradients.of(head, need_dh, need_dw)
    head_chunks.backward(head, of_rows, chunk_bytes, dloss, lse, kept, gradients)
    return gradients.of_all_rows(head)


def _gradients_like(
    h: Tensor, weight: Tensor, bias: Tensor | None, need_dh: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(h.dtype)
    with_bias = need_dw and bias is not None
    return (
        h.new_empty(h.shape if need_dh else (0,)),
        weight.new_empty(weight.shape if need_dw else (0,), dtype=acc),
        weight.new_empty(len(weight) if with_bias else 0, dtype=acc),
    )


@_linear_cross_entropy.register_fake
def _(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Sequence[float],
    chunk_bytes: int,
    max_counted: int,
    need_dh: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = h.new_empty((), dtype=accumulation_dtype(h.dtype))
    return loss, *_gradients_like(h, weight, bias, need_dh, need_dw)


@_linear_nll.register_fake
def _(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Sequence[float],
    chunk_bytes: int,
    max_counted: int,
    kept_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = h.new_empty(h.shape[0], dtype=accumulation_dtype(h.dtype))
    return loss, torch.empty_like(loss), head_chunks.room(h, kept_rows, weight.shape[0])


@_linear_nll_backward.register_fake
def _(
    dloss: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    kept: Tensor,
    options: Sequence[float],
    chunk_bytes: int,
    max_counted: int,
    need_dh: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(h, weight, bias, need_dh, need_dw)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, weight, bias, *_, ctx.need_dh, ctx.need_dw = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in (h, weight, bias)]
    _, dh, dw, db = output
    ctx.save_for_backward(dh, dw, db)
    ctx.mark_non_differentiable(dh, dw, db)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    scaled_dh = scaled_dw = scaled_db = None
    if dloss is not None:
        dh, dw, db = ctx.saved_tensors
        h_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if ctx.need_dw:  # first, as the largest: it fits where the forward's logits were
            scaled_dw = (dw * dloss).to(weight_dtype)
        if ctx.need_dh:
            scaled_dh = (dh * dloss).to(h_dtype)
        if ctx.need_dw and bias_dtype is not None:
            scaled_db = (db * dloss).to(bias_dtype)
    return scaled_dh, scaled_dw, scaled_db, None, None, None, None, None, None


def _nll_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, weight, bias, targets, ctx.options, ctx.chunk_bytes, ctx.max_counted, _ = inputs
    _, lse, kept = output
    ctx.save_for_backward(h, weight, bias, targets, lse, kept)
    ctx.mark_non_differentiable(lse, kept)
    ctx.set_materialize_grads(False)


def _nll_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    dh = dw = db = None
    if dloss is not None:
        h, weight, bias, targets, lse, kept = ctx.saved_tensors
        need_dh, need_weight, need_bias, *_ = ctx.needs_input_grad
        need_dw = need_weight or need_bias
        given = (dloss, h, weight, bias, targets, lse, kept)
        limits = (ctx.options, ctx.chunk_bytes, ctx.max_counted)
        dh, dw, db = _linear_nll_backward(*given, *limits, need_dh, need_dw)
        dh = dh if need_dh else None
        dw = dw.to(weight.dtype) if need_dw else None
        db = db.to(bias.dtype) if need_dw and bias is not None else None
    return dh, dw, db, None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)
_linear_nll.register_autograd(_nll_backward, setup_context=_nll_save)
for op in (_linear_cross_entropy, _linear_nll, _linear_nll_backward):
    call_directly_on_cpu(op)


@dataclass(frozen=True)
class Limits:
    """What linear_cross_entropy() and linear_logprobs() may take, as their docstrings say."""

    chunk_bytes: int | None
    max_counted: int | None
    keep_bytes: int | None


def head_loss(
    name: str,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: LossOptions,
    reduction: str,
    limits: Limits,
) -> Tensor:
    """The loss of each row ("none"), or their sum.

    The checks and the dtype rules of linear_cross_entropy and linear_logprobs, whichever the name
    is; eight parameters, because they share all of these.
    """
    options.check(name, reduction, len(weight))
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1]:
        shapes = f"h {tuple(h.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{name}: {shapes} must be (N, D) and (V, D)")
    if targets.shape != h.shape[:1]:
        expected = f"(N,) = ({h.shape[0]},)"
        raise ValueError(f"{name}: targets {tuple(targets.shape)} must be {expected}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias {tuple(bias.shape)} must be (V,) = ({len(weight)},)")
    h = h.to(matmul_dtype(h))
    chunk_bytes = limits.chunk_bytes or 0
    max_counted = -1 if limits.max_counted is None else limits.max_counted
    given = (h, weight, bias, targets, options.flat(), chunk_bytes, max_counted)
    grad = torch.is_grad_enabled()
    need_dh = grad and h.requires_grad
    of_bias = bias is not None and bias.requires_grad
    need_dw = grad and (weight.requires_grad or of_bias)
    if reduction != "none":
        return _linear_cross_entropy(*given, need_dh, need_dw)[0]
    kept_rows = 0
    if need_dh or need_dw:
        keep_bytes = limits.keep_bytes
        if keep_bytes is None:
            keep_bytes = -1 if limits.chunk_bytes is None else 0
        kept_rows = head_chunks.kept_rows(h, len(weight), max_counted, keep_bytes)
    return _linear_nll(*given, kept_rows)[0]


# Twelve parameters: the options are what users write.
def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    max_counted: int | None = None,
    keep_bytes: int | None = None,
) -> Tensor:
    """cross_entropy(h W^T + bias, targets) in nats, without ever holding the (N, V) logits.

    h (N, D), weight (V, D), bias (V,), targets (N,) integers; columns from vocab_size on are
    padding. Returns fp32 whatever autocast says, a scalar, or (N,) for "none". The matmuls run in
    h's dtype, or autocast's; dW is added up in fp32.

    chunk_bytes: the most bytes of logits held at a time (None: 256 MiB or a 64th of the GPU's
    memory, on a CPU 50 to 200 MiB). max_counted: the caller's promise that at most so many targets
    count; the others then cost no matmul (on a CPU they never do). keep_bytes: so many bytes of
    logits, where gradients are wanted, does the forward of "none" keep for the backward, which need
    not make them again and has the same bits (None: 256 MiB on a CPU if chunk_bytes is None, none
    elsewhere).

    Gradients of gradients are not defined. Raises ValueError on shapes or options that do not fit.
    """
    options = LossOptions(ignore_index, z_loss, label_smoothing, softcap, vocab_size)
    limits = Limits(chunk_bytes, max_counted, keep_bytes)
    name = "linear_cross_entropy"
    loss = head_loss(name, h, weight, bias, targets, options, reduction, limits)
    return mean_over_counted(loss, targets, ignore_index) if reduction == "mean" else loss

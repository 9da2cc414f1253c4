"""Cross-entropy of logits that exist: one pass over them forward, one read and one write back.

    z = logits[:, :vocab_size], or cap tanh(logits / cap) with a soft cap
    lse = log sum_j exp z_j
    loss = (1 - a) (lse - z_t) + a (lse - mean_j z_j) + b lse^2
    dloss / dz_j = p_j (1 + 2 b lse) - (1 - a) [j = t] - a / V,  p_j = exp(z_j - lse)
    dlogits = dloss / dz upstream, times 1 - (z / cap)^2 with a soft cap
    a: label smoothing, b: z-loss, t: the target

logits: (N, V) of any float dtype; targets: (N,) integers. loss, lse: (N,) fp32, in nats; dlogits
has the logits' dtype. An ignored row has loss 0 and gradient 0; a row whose target is neither
ignored nor in [0, vocab_size) has loss NaN and gradient NaN. Columns from vocab_size on are
padding: they take no part and get gradient 0. Saved for the backward: logits and lse. Floor, in
logits-sized passes: forward 1 read; backward 1 read, 1 write.
Source: label smoothing, Szegedy et al. 2016; z-loss, Chowdhery et al. (PaLM) 2022; soft cap,
Gemma 2, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import (
    accumulation_dtype,
    as_rows,
    call_directly_on_cpu,
    takes_triton,
)
from fastlm.kernels.loss_options import LossOptions, mean_over_counted


def _logits_reference(logits: Tensor, options: LossOptions) -> Tensor:
    """z, in the dtype that sums are kept in."""
    z = logits[:, : options.columns(logits.shape[1])].to(accumulation_dtype(logits.dtype))
    return options.softcap * torch.tanh(z / options.softcap) if options.softcap else z


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of each row in plain PyTorch."""
    z = _logits_reference(logits, options)
    vocab_size = z.shape[1]
    lse = torch.logsumexp(z, -1)
    at = targets.long().clamp(0, vocab_size - 1).unsqueeze(1)
    picked = z.gather(1, at).squeeze(1)
    loss = (1 - options.label_smoothing) * (lse - picked)
    if options.label_smoothing:
        loss = loss + options.label_smoothing * (lse - z.mean(-1))
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    loss = loss.masked_fill((targets < 0) | (targets >= vocab_size), float("nan"))
    return loss.masked_fill(targets == options.ignore_index, 0.0), lse


def cross_entropy_backward_reference(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, options: LossOptions
) -> Tensor:
    """dlogits (N, V) from the rows' upstream gradients dloss (N,), in plain PyTorch."""
    z = _logits_reference(logits, options)
    vocab_size = z.shape[1]
    grad = torch.exp(z - lse.unsqueeze(1))
    if options.z_loss:
        grad = grad * (1 + 2 * options.z_loss * lse.unsqueeze(1))
    if options.label_smoothing:
        grad = grad - options.label_smoothing / vocab_size
    at = targets.long().clamp(0, vocab_size - 1).unsqueeze(1)
    at_target = torch.full_like(at, options.label_smoothing - 1, dtype=grad.dtype)
    grad = grad.scatter_add(1, at, at_target)
    if options.softcap:
        grad = grad * (1 - (z / options.softcap).square())
    grad = grad * dloss.to(grad.dtype).unsqueeze(1)
    outside = (targets < 0) | (targets >= vocab_size)
    grad = grad.masked_fill(outside.unsqueeze(1), float("nan"))
    grad = grad.masked_fill((targets == options.ignore_index).unsqueeze(1), 0.0)
    return torch.nn.functional.pad(grad, (0, logits.shape[1] - vocab_size)).to(logits.dtype)


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    options: LossOptions,
) -> None:
    """Fill loss and lse (N,) of logits (N, V), or read lse where loss is None; fill dlogits.

    dlogits (N, V) may be logits, or None where no gradient is wanted; dloss (N,), the rows'
    upstream gradients, is 1 where it is None. The columns of logits and of dlogits are adjacent.
    """
    if takes_triton(logits):
        from fastlm.kernels.triton import cross_entropy as on_gpu

        on_gpu.rows(logits, targets, loss, lse, dloss, dlogits, options)
    elif native.available(logits):
        native.cross_entropy_rows(logits, targets, loss, lse, dloss, dlogits, options)
    else:
        if loss is not None:
            row_loss, row_lse = cross_entropy_reference(logits, targets, options)
            loss.copy_(row_loss)
            lse.copy_(row_lse)
        if dlogits is not None:
            upstream = torch.ones_like(lse) if dloss is None else dloss
            grad = cross_entropy_backward_reference(upstream, logits, targets, lse, options)
            dlogits.copy_(grad)


@torch.library.custom_op("fastlm::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, targets: Tensor, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of each row; options: LossOptions.flat()."""
    loss = logits.new_empty(len(logits), dtype=accumulation_dtype(logits.dtype))
    lse = torch.empty_like(loss)
    cross_entropy_rows(as_rows(logits), targets, loss, lse, None, None, LossOptions.of(options))
    return loss, lse


@torch.library.custom_op("fastlm::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, options: Sequence[float]
) -> Tensor:
    """dlogits."""
    rows = as_rows(logits)
    dlogits = logits.new_empty(logits.shape)
    read = lse.contiguous()
    cross_entropy_rows(rows, targets, None, read, dloss, dlogits, LossOptions.of(options))
    return dlogits


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, options: Sequence[float]) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


@_cross_entropy_backward.register_fake
def _(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, options: Sequence[float]
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ctx.options = inputs
    _, lse = output
    ctx.save_for_backward(logits, targets, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, _dlse: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, None
    return _cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.options), None, None


_cross_entropy.register_autograd(_backward, setup_context=_save)
call_directly_on_cpu(_cross_entropy)
call_directly_on_cpu(_cross_entropy_backward)


# Eight parameters: the options are what users write.
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Cross-entropy in nats: (1 - a) (lse - z_t) + a (lse - mean z) + b lse^2 per row.

    a label_smoothing, b z_loss. logits (..., V), targets (...) integers; columns from vocab_size on
    are padding. Returns fp32 whatever autocast says: a scalar for "mean" (over targets other than
    ignore_index; 0 if there are none) and "sum", targets' shape for "none". A target out of range
    makes its row NaN. Raises ValueError on shapes or options that do not fit.
    """
    width = logits.shape[-1]
    options = LossOptions(ignore_index, z_loss, label_smoothing, softcap, vocab_size)
    options.check("cross_entropy", reduction, width)
    if targets.shape != logits.shape[:-1]:
        expected = f"logits' shape without the last dimension, {tuple(logits.shape[:-1])}"
        raise ValueError(f"cross_entropy: targets {tuple(targets.shape)} must be {expected}")
    loss, _ = _cross_entropy(logits.reshape(-1, width), targets.reshape(-1), options.flat())
    if reduction == "none":
        return loss.view(targets.shape)
    return (
        loss.sum() if reduction == "sum" else mean_over_counted(loss.sum(), targets, ignore_index)
    )

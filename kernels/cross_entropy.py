"""Cross-entropy of logits that exist: one pass over the vocabulary forward, one read and one write backward.

    z = logits[:, :vocab_size], or cap tanh(logits / cap) with a soft cap          lse = log sum_j exp z_j
    loss = (1 - a) (lse - z_t) + a (lse - mean_j z_j) + b lse^2          a: label smoothing, b: z-loss, t: the target
    dloss / dz_j = p_j (1 + 2 b lse) - (1 - a) [j = t] - a / V,  p_j = exp(z_j - lse)
    dlogits = dloss / dz upstream, times 1 - (z / cap)^2 with a soft cap

logits: (N, V) of any float dtype; targets: (N,) integers. loss, lse: (N,) fp32, in nats; dlogits has the logits' dtype.
An ignored row has loss 0 and gradient 0; a row whose target is neither ignored nor in [0, vocab_size) has loss NaN
and gradient NaN. Columns from vocab_size on are padding: they take no part and get gradient 0.
Saved for the backward: logits and lse. Floor, in logits-sized passes: forward 1 read; backward 1 read, 1 write.
Source: label smoothing, Szegedy et al. 2016; z-loss, Chowdhery et al. (PaLM) 2022; soft cap, Gemma 2, 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import cpu
from fastlm.kernels.common import accumulation_dtype


def _logits_reference(logits: Tensor, softcap: float, vocab_size: int) -> Tensor:
    z = logits[:, :vocab_size].to(accumulation_dtype(logits.dtype))
    return softcap * torch.tanh(z / softcap) if softcap else z


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of each row in plain PyTorch."""
    z = _logits_reference(logits, softcap, vocab_size)
    lse = torch.logsumexp(z, -1)
    picked = z.gather(1, targets.long().clamp(0, vocab_size - 1).unsqueeze(1)).squeeze(1)
    loss = (1 - label_smoothing) * (lse - picked)
    if label_smoothing:
        loss = loss + label_smoothing * (lse - z.mean(-1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = loss.masked_fill((targets < 0) | (targets >= vocab_size), float("nan"))
    return loss.masked_fill(targets == ignore_index, 0.0), lse


def cross_entropy_backward_reference(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> Tensor:
    """dlogits (N, V) from the rows' upstream gradients dloss (N,), in plain PyTorch."""
    z = _logits_reference(logits, softcap, vocab_size)
    grad = torch.exp(z - lse.unsqueeze(1))
    if z_loss:
        grad = grad * (1 + 2 * z_loss * lse.unsqueeze(1))
    if label_smoothing:
        grad = grad - label_smoothing / vocab_size
    at = targets.long().clamp(0, vocab_size - 1).unsqueeze(1)
    grad = grad.scatter_add(1, at, torch.full_like(at, label_smoothing - 1, dtype=grad.dtype))
    if softcap:
        grad = grad * (1 - (z / softcap).square())
    grad = grad * dloss.to(grad.dtype).unsqueeze(1)
    grad = grad.masked_fill(((targets < 0) | (targets >= vocab_size)).unsqueeze(1), float("nan"))
    grad = grad.masked_fill((targets == ignore_index).unsqueeze(1), 0.0)
    return torch.nn.functional.pad(grad, (0, logits.shape[1] - vocab_size)).to(logits.dtype)


# ---------------------------------------------------------------- registration


@torch.library.custom_op("fastlm::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    return _cross_entropy_cpu(logits, targets, ignore_index, z_loss, label_smoothing, softcap, vocab_size)


@torch.library.custom_op("fastlm::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> Tensor:
    return _cross_entropy_backward_cpu(
        dloss, logits, targets, lse, ignore_index, z_loss, label_smoothing, softcap, vocab_size
    )


@_cross_entropy.register_kernel("cpu")
def _cross_entropy_cpu(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    options = (ignore_index, z_loss, label_smoothing, softcap, vocab_size)
    return (cpu.cross_entropy if cpu.available(logits) else cross_entropy_reference)(logits, targets, *options)


@_cross_entropy_backward.register_kernel("cpu")
def _cross_entropy_backward_cpu(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> Tensor:
    backward = cpu.cross_entropy_backward if cpu.available(logits) else cross_entropy_backward_reference
    return backward(dloss, logits, targets, lse, ignore_index, z_loss, label_smoothing, softcap, vocab_size)


@_cross_entropy.register_fake
def _(logits, targets, ignore_index, z_loss, label_smoothing, softcap, vocab_size):
    loss = logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


@_cross_entropy_backward.register_fake
def _(dloss, logits, targets, lse, ignore_index, z_loss, label_smoothing, softcap, vocab_size):
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, _):
    dlogits = None if dloss is None else _cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dlogits, None, None, None, None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_setup)


def check_options(
    name: str, reduction: str, label_smoothing: float, softcap: float, vocab_size: int, width: int
) -> None:
    """Raise ValueError, with the call's name in front, for an option that makes no sense."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}, expected 0 to 1")
    if softcap < 0:
        raise ValueError(f"{name}: softcap is {softcap}, expected a positive bound, or 0 for none")
    if not 0 < vocab_size <= width:
        raise ValueError(f"{name}: vocab_size is {vocab_size}, expected 1 to {width}, the number of columns")


def mean_over_counted(total: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """total divided by the number of targets that count; 0 where none does. No host sync."""
    return total / (targets != ignore_index).sum().clamp(min=1)


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
    """Cross-entropy in nats: (1 - a) (lse - z_t) + a (lse - mean z) + b lse^2 per row; a label_smoothing, b z_loss.

    logits (..., V), targets (...) integers; columns from vocab_size on are padding. Returns fp32 whatever autocast
    says: a scalar for "mean" (over targets other than ignore_index; 0 if there are none) and "sum", targets' shape
    for "none". A target out of range makes its row NaN. Raises ValueError on shapes or options that do not fit.
    """
    width = logits.shape[-1]
    vocab_size = width if vocab_size is None else vocab_size
    check_options("cross_entropy", reduction, label_smoothing, softcap, vocab_size, width)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: targets {tuple(targets.shape)} must be logits' shape without the last dimension, "
            f"{tuple(logits.shape[:-1])}"
        )
    loss, _ = _cross_entropy(
        logits.reshape(-1, width), targets.reshape(-1), ignore_index, z_loss, label_smoothing, softcap, vocab_size
    )
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else mean_over_counted(loss.sum(), targets, ignore_index)

"""From logits to the next token: penalty, temperature, top-k, top-p, min-p, then one draw a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.config import Sampling

# The nucleus is nearly always among so many tokens: sorting these is 100 times cheaper than the
# vocabulary.
FEW = 256


def restrict(logits: Tensor, s: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits (B, V) of the distribution to draw from; -inf where a token is excluded.

    In this order: the logits of seen tokens (B, V) bool are divided by repetition_penalty where
    positive and multiplied where negative (Keskar et al. 2019); all are divided by the temperature;
    top_k keeps so many of the likeliest; top_p the smallest set that reaches this probability
    (Holtzman et al. 2020); min_p those at least this share as likely as the likeliest (Nguyen et
    al. 2024). The likeliest token always stays. temperature 0 is left to choose().
    """
    if s.repetition_penalty != 1 and seen is not None:
        penalised = torch.where(
            logits < 0, logits * s.repetition_penalty, logits / s.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if s.temperature == 0:
        return logits
    logits = logits / s.temperature
    if 0 < s.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[:, -1:], -torch.inf)
    if s.top_p < 1:
        logits = logits.masked_fill(logits < least_of_nucleus(logits, s.top_p), -torch.inf)
    if s.min_p > 0:
        logits = logits.masked_fill(
            logits.softmax(-1) < s.min_p * logits.softmax(-1).amax(-1, keepdim=True), -torch.inf
        )
    return logits


def running_sums(x: Tensor) -> Tensor:
    """Cumulative sums of probabilities x (..., V) along the last axis."""
    return fixed_point_sums(x) if x.is_cuda else x.cumsum(-1)


def fixed_point_sums(x: Tensor) -> Tensor:
    """running_sums() of x in whole multiples of 2^-40, fp64.

    Whatever the order of additions, which on a GPU is not fixed, the sums have the same bits.
    """
    return (x.double() * 2.0**40).long().cumsum(-1).double() * 2.0**-40


def least_of_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit (B, 1) of each row's nucleus: the likeliest that reach top_p together."""
    total = logits.logsumexp(-1, keepdim=True)
    everything = logits.shape[-1]
    # whether a few suffice could be seen on a GPU only by waiting for it
    few = everything if logits.is_cuda else min(FEW, everything)
    for k in (few, everything):
        top = logits.topk(k).values
        mass = running_sums((top - total).exp())
        if k == everything or bool((mass[:, -1] >= top_p).all()):
            break
    inside = (mass - (top - total).exp() < top_p).sum(-1, keepdim=True)
    return top.gather(-1, inside.clamp(min=1) - 1)


def uniform(generators: Sequence[torch.Generator], n: int = 1) -> Tensor:
    """n numbers of [0, 1) a row, (n, B, 1) fp64 on the CPU.

    Each row has a generator of its own, so that its text does not depend on its neighbours.
    """
    rows = [torch.rand(n, generator=g, dtype=torch.float64) for g in generators]
    return torch.stack(rows, 1)[..., None]


def choose(logits: Tensor, s: Sampling, draws: Tensor | None, seen: Tensor | None = None) -> Tensor:
    """One token a row, (B,) int64, of logits (B, V): the likeliest at temperature 0, else a draw.

    draws: (B, 1) of uniform(), each of which falls on a token of the cumulative distribution. On a
    GPU the host waits for nothing.
    """
    logits = restrict(logits.float(), s, seen)
    if s.temperature == 0:
        return logits.argmax(-1)
    assert draws is not None
    below = running_sums(logits.softmax(-1).double())
    return torch.searchsorted(below, draws * below[:, -1:], right=True).squeeze(-1)

"""Total -log p of segments, fast: batches of like length, the head only where something is scored, one read back at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastlm import kernels
from fastlm.evaluation.protocols import Protocol, Segment
from fastlm.model import Transformer
from fastlm.runtime import compiled, free_bytes, ranks

BATCH_TOKENS = {"cpu": 4096, "cuda": 131072}  # more is no faster
LOGIT_ROWS = 512  # of logits at a time, where all of them are needed


# log p (n,) of targets (n,), each predicted at its flat position index (n,) of tokens (B, T)
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


def logps_of(model: Transformer, trunk: Callable[[Tensor], Tensor]) -> Logps:
    """The head runs on the scored positions alone, and its logits are never all in memory. trunk: the model, or it compiled."""

    def logps(tokens: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        h = trunk(tokens).flatten(0, 1)[index]
        return kernels.linear_logprobs(h, model.head_weight, targets, vocab_size=model.config.vocab_size)

    return logps


def segment_nats(
    model: Transformer | Logps, segments: Sequence[Segment], device: torch.device, batch_tokens: int = 0,
    progress: Callable[[int], None] = lambda n: None, compile: bool = False,
) -> np.ndarray:  # fmt: skip
    """-log p of each segment's scored tokens, nats, float64 (n_segments,); the other arguments as in segment_sums().

    compile: with torch.compile, where the model is fastlm's own.
    """
    if not isinstance(model, Transformer):
        return -segment_sums(model, segments, device, batch_tokens, progress)
    budget = batch_tokens or least_of_ranks(tokens_that_fit(model, device), device)
    if not compile:
        return -segment_sums(logps_of(model, model), segments, device, budget, progress)
    logps = logps_of(model, compiled(model, device))
    with torch._dynamo.config.patch(recompile_limit=64):  # a graph for each shape, one for each bit of the longest length
        return -segment_sums(logps, segments, device, budget, progress, few_shapes=True)


def tokens_that_fit(model: Transformer, device: torch.device) -> int:
    """Tokens of a pass that needs at most half of the free memory: the widest moment holds gate_up, SwiGLU's result, the
    stream and a layer's q, k, v, each fp32 at most."""
    c = model.config
    each = 4 * (3 * c.ffn_dim + 6 * c.dim + 2 * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim)
    return max(1024, min(BATCH_TOKENS[device.type], free_bytes(device) // 2 // each))


def least_of_ranks(number: int, device: torch.device) -> int:
    """The smallest of all processes' numbers: batches are shared out by number, so all must cut the same ones."""
    if ranks()[1] == 1:
        return number
    least = torch.tensor(number, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


@torch.no_grad()
def segment_sums(
    score: Logps, segments: Sequence[Segment], device: torch.device, batch_tokens: int = 0,
    progress: Callable[[int], None] = lambda n: None, width: tuple[int, ...] = (), few_shapes: bool = False,
) -> np.ndarray:  # fmt: skip
    """The sum over each segment's scored tokens of what score() gives for one, of shape width: float64 (n_segments, *width).

    Longest first, in batches of at most batch_tokens padded tokens (0: by device), with few_shapes padded to a few shapes.
    Padding stands behind a segment, where causal attention never looks. Of several processes each takes every so-manieth
    batch, and all get the whole result.
    """
    lengths = [len(s.ids) - 1 for s in segments]
    split = batches_of_few_shapes if few_shapes else batches
    totals = torch.zeros(len(segments), *width, dtype=torch.float64, device=device)
    rank, world = ranks()
    for turn, (batch, rows, length) in enumerate(split(lengths, batch_tokens or BATCH_TOKENS[device.type])):
        if turn % world != rank:
            continue
        tokens, index, targets, owner = layout([segments[i] for i in batch], rows, length)
        scored = score(tokens.to(device), index.to(device), targets.to(device)).double()
        totals.index_add_(0, torch.tensor(batch)[owner].to(device), scored)
        progress(len(targets))
    if world > 1:
        dist.all_reduce(totals)
    return totals.cpu().numpy()


def batches(lengths: Sequence[int], budget: int) -> Iterator[tuple[list[int], int, int]]:
    """Indices, longest first, and the rows and columns of a batch that holds them, of at most budget tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, budget // lengths[order[0]])
        batch, order = order[:rows], order[rows:]
        yield batch, len(batch), lengths[batch[0]]


def batches_of_few_shapes(lengths: Sequence[int], budget: int) -> Iterator[tuple[list[int], int, int]]:
    """The same, with a power of two of columns, or the longest's, and as many rows in all batches of so many columns."""
    longest = max(lengths, default=0)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for length, group in groupby(order, lambda i: min(longest, 1 << (lengths[i] - 1).bit_length())):
        alike = list(group)
        count = -(-len(alike) // max(1, budget // length))
        rows = -(-len(alike) // count)
        for start in range(0, len(alike), rows):
            yield alike[start : start + rows], rows, length


def layout(segments: Sequence[Segment], rows: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens (rows, length); of each scored token the flat position that predicts it, its id, and its segment's row."""
    tokens = torch.zeros(rows, length, dtype=torch.long)
    index, targets, owner = [], [], []
    for row, s in enumerate(segments):
        ids = torch.as_tensor(s.ids, dtype=torch.long)
        tokens[row, : len(ids) - 1] = ids[:-1]
        index.append(row * length + torch.arange(s.start - 1, len(ids) - 1))
        targets.append(ids[s.start :])
        owner.append(torch.full((s.n_scored,), row))
    return tokens, torch.cat(index), torch.cat(targets), torch.cat(owner)


@dataclass(frozen=True)
class Result:
    """One protocol's outcome: what was added up, over what, and the perplexities that follow."""

    protocol: str
    nats: float
    tokens: int
    words: int
    text_bytes: int
    how: str
    perplexity: float
    low: float
    high: float
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float


@np.errstate(over="ignore")  # of a hopeless model, perplexity per word may be inf
def summarise(protocol: Protocol, nats: np.ndarray, resamples: int = 1000) -> Result:
    """perplexity = exp(nats / tokens), with a bootstrap 95% interval over documents (Efron's percentiles, fixed seed)."""
    documents = np.array([s.document for s in protocol.segments])
    _, group = np.unique(documents, return_inverse=True)
    per_document = np.bincount(group, weights=nats)
    counted = np.bincount(group, weights=[s.n_scored for s in protocol.segments])
    draws = np.random.default_rng(0).integers(len(counted), size=(resamples, len(counted)))
    low, high = np.exp(np.percentile(per_document[draws].sum(1) / counted[draws].sum(1), [2.5, 97.5]))
    total, tokens = float(nats.sum()), int(counted.sum())
    return Result(
        protocol.name, total, tokens, protocol.words, protocol.text_bytes, protocol.how,
        float(np.exp(total / tokens)), float(low), float(high), float(np.exp(total / protocol.words)),
        float(np.exp(total / protocol.text_bytes)), total / protocol.text_bytes / float(np.log(2)),
    )  # fmt: skip

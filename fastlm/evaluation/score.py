"""Total -log p of segments, fast.

Segments of like length share a batch, the head runs only where something is scored, and results are
read back once, at the end.
"""

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

# (tokens (B, T), index (n,), targets (n,)) -> log p (n,) of the targets, each predicted at its flat
# position in tokens
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
# (indices of the segments in a batch, its rows, its columns)
Batch = tuple[list[int], int, int]


def logps_of(model: Transformer, trunk: Callable[[Tensor], Tensor]) -> Logps:
    """The head on the scored positions alone; its logits are never all in memory.

    trunk: the model, or the model compiled.
    """

    def logps(tokens: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        h = trunk(tokens).flatten(0, 1)[index]
        vocab_size = model.config.vocab_size
        return kernels.linear_logprobs(h, model.head_weight, targets, vocab_size=vocab_size)

    return logps


def segment_nats(
    model: Transformer | Logps,
    segments: Sequence[Segment],
    device: torch.device,
    batch_tokens: int = 0,
    progress: Callable[[int], None] = lambda n: None,
    compile: bool = False,
) -> np.ndarray:
    """-log p of each segment's scored tokens, nats, float64 (n_segments,).

    compile: with torch.compile, where the model is fastlm's own. The rest as in segment_sums().
    """
    if not isinstance(model, Transformer):
        return -segment_sums(model, segments, device, batch_tokens, progress)
    budget = batch_tokens or smallest_of_all_processes(tokens_that_fit(model, device), device)
    if not compile:
        return -segment_sums(logps_of(model, model), segments, device, budget, progress)
    logps = logps_of(model, compiled(model, device))
    # a graph for each shape, one for each bit of the longest length
    with torch._dynamo.config.patch(recompile_limit=64):
        return -segment_sums(logps, segments, device, budget, progress, few_shapes=True)


def tokens_that_fit(model: Transformer, device: torch.device) -> int:
    """Tokens of a pass that needs at most half of the free memory.

    The peak of a layer holds gate_up, SwiGLU's result, the stream and q, k, v, each fp32 at most.
    """
    c = model.config
    bytes_per_token = 4 * (
        3 * c.ffn_dim + 6 * c.dim + 2 * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    )
    fitting = free_bytes(device) // 2 // bytes_per_token
    return max(1024, min(BATCH_TOKENS[device.type], fitting))


def smallest_of_all_processes(number: int, device: torch.device) -> int:
    """The smallest of all processes' numbers: they share batches by number, so all cut alike."""
    if ranks()[1] == 1:
        return number
    smallest = torch.tensor(number, device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


@torch.no_grad()
def segment_sums(
    score: Logps,
    segments: Sequence[Segment],
    device: torch.device,
    batch_tokens: int = 0,
    progress: Callable[[int], None] = lambda n: None,
    width: tuple[int, ...] = (),
    few_shapes: bool = False,
) -> np.ndarray:
    """Sums of score() over each segment's scored tokens, float64 (n_segments, *width).

    width: the shape that score() gives for a token. batch_tokens: padded tokens of a batch at most,
    longest segments first (0: by device); few_shapes: padded to a few shapes. Padding stands behind
    a segment, where causal attention never looks. With several processes each scores its share of
    the batches, and all get the whole result.
    """
    lengths = [len(s.ids) - 1 for s in segments]
    split = batches_of_few_shapes if few_shapes else batches
    totals = torch.zeros(len(segments), *width, dtype=torch.float64, device=device)
    rank, world = ranks()
    all_batches = split(lengths, batch_tokens or BATCH_TOKENS[device.type])
    for number, (batch, rows, columns) in enumerate(all_batches):
        if number % world != rank:
            continue
        in_batch = [segments[i] for i in batch]
        tokens, index, targets, owner = padded_batch(in_batch, rows, columns)
        scored = score(tokens.to(device), index.to(device), targets.to(device)).double()
        totals.index_add_(0, torch.tensor(batch)[owner].to(device), scored)
        progress(len(targets))
    if world > 1:
        dist.all_reduce(totals)
    return totals.cpu().numpy()


def batches(lengths: Sequence[int], budget: int) -> Iterator[Batch]:
    """Longest first, in batches of at most budget tokens (or one segment), padding included."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        columns = lengths[order[0]]
        rows = max(1, budget // columns)
        batch = order[:rows]
        order = order[rows:]
        yield batch, len(batch), columns


def batches_of_few_shapes(lengths: Sequence[int], budget: int) -> Iterator[Batch]:
    """The same, with columns a power of two or the longest length.

    Batches of equal columns have equal rows too.
    """
    longest = max(lengths, default=0)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def padded(i: int) -> int:
        return min(longest, 1 << (lengths[i] - 1).bit_length())

    for columns, group in groupby(order, padded):
        alike = list(group)
        n_batches = -(-len(alike) // max(1, budget // columns))
        rows = -(-len(alike) // n_batches)
        for start in range(0, len(alike), rows):
            yield alike[start : start + rows], rows, columns


def padded_batch(
    segments: Sequence[Segment], rows: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The segments as rows of one batch, padded with 0 at the right.

    Returns tokens (rows, columns), and of each of the n scored tokens, (n,) each: its flat position
    in tokens, from which it is predicted, its id, and its row.
    """
    tokens = torch.zeros(rows, columns, dtype=torch.long)
    index = []
    targets = []
    owner = []
    for row, s in enumerate(segments):
        ids = torch.as_tensor(s.ids, dtype=torch.long)
        tokens[row, : len(ids) - 1] = ids[:-1]
        index.append(row * columns + torch.arange(s.start - 1, len(ids) - 1))
        targets.append(ids[s.start :])
        owner.append(torch.full((s.n_scored,), row))
    return tokens, torch.cat(index), torch.cat(targets), torch.cat(owner)


def perplexity(nats: float) -> float:
    """exp(nats per token); inf where fp64 ends."""
    return float(torch.exp(torch.tensor(nats, dtype=torch.float64)))


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
    """perplexity = exp(nats / tokens), with a bootstrap 95% interval over documents.

    Percentiles of resampled documents (Efron), with a fixed seed.
    """
    documents = np.array([s.document for s in protocol.segments])
    _, group = np.unique(documents, return_inverse=True)
    nats_of = np.bincount(group, weights=nats)
    tokens_of = np.bincount(group, weights=[s.n_scored for s in protocol.segments])
    draws = np.random.default_rng(0).integers(len(tokens_of), size=(resamples, len(tokens_of)))
    resampled = nats_of[draws].sum(1) / tokens_of[draws].sum(1)
    low, high = np.exp(np.percentile(resampled, [2.5, 97.5]))
    total = float(nats.sum())
    tokens = int(tokens_of.sum())
    return Result(
        protocol=protocol.name,
        nats=total,
        tokens=tokens,
        words=protocol.words,
        text_bytes=protocol.text_bytes,
        how=protocol.how,
        perplexity=float(np.exp(total / tokens)),
        low=float(low),
        high=float(high),
        word_perplexity=float(np.exp(total / protocol.words)),
        byte_perplexity=float(np.exp(total / protocol.text_bytes)),
        bits_per_byte=total / protocol.text_bytes / float(np.log(2)),
    )

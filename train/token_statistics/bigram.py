"""Embedding and head from a text's statistics: a start as the best low-rank bigram model.

With n(i, j) the count of token j right after token i, n(i) = sum_j n(i, j) and p(j) the share of j
in the text,

    log p(j | i)  =  log p(j)  +  M_ij,      M_ij = log( (n(i, j) / p(j) + k) / (n(i) + k) )

the pointwise mutual information of i and j, shrunk towards 0 by k pseudo-counts drawn from p. The
truncated singular value decomposition of M, rows and columns weighted by sqrt(p), gives M ~ U V^T
of rank dim - 2 (Levy and Goldberg 2014 factor the same matrix). Two channels are left: one that is
c in every embedding and carries log p(j) in the head, and one that gives every embedding the norm
sqrt(dim), which RMSNorm then leaves alone:

    embedding_i = [c, rest of the norm, U_i]          head_j = [log p(j) / c, 0, V_j]
    head_j . RMSNorm(embedding_i)  ~  log p(j | i)

Only the `frequent` most frequent tokens have a row in M; the others start with p alone. Counting
takes a second, the decomposition a few (two cores).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.errors import check
from fastlm.model import Transformer, initialise

FREQUENT = 4096
PSEUDO_COUNTS = 100.0


@torch.no_grad()
def initialise_from_bigrams(model: Transformer, seed: int, text: Tensor) -> None:
    """initialise(), then embedding and head as the tables of a text, (n,) int64.

    Raises UserError where the model has one table for both.
    """
    c = model.config
    check(
        not c.tie_embeddings,
        "init bigram needs an untied head; pass --model.no-tie-embeddings, or --init normal",
    )
    generator = initialise(model, seed)
    embedding, head = bigram_tables(text, c.vocab_size, c.dim, generator)
    model.embedding[: c.vocab_size] = embedding
    model.head[: c.vocab_size] = head


def bigram_tables(
    tokens: Tensor,
    vocab_size: int,
    dim: int,
    generator: torch.Generator,
    frequent: int = FREQUENT,
    k: float = PSEUDO_COUNTS,
) -> tuple[Tensor, Tensor]:
    """Embedding and head, (vocab_size, dim) each, fp32, of a text (n,) int64; dim is at least 4."""
    counts = torch.bincount(tokens, minlength=vocab_size).double() + 0.1
    log_p = (counts / counts.sum()).log().float()
    top = counts.argsort(descending=True, stable=True)[:frequent]
    information = pointwise_information(tokens, top, vocab_size, k)
    u, v = factors(information, counts[top].float(), dim - 2, generator)

    c = 0.3 * dim**0.5
    room = (dim - c * c) ** 0.5  # what is left of the norm sqrt(dim)
    norms = u.norm(dim=1)
    scale = 0.98 * room / norms.quantile(0.99)  # the hundredth with the longest rows is clipped
    u = u * scale
    v = v / scale
    u *= (0.99 * room / u.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp(max=1)
    embedding = torch.zeros(vocab_size, dim)
    head = torch.zeros(vocab_size, dim)
    embedding[:, 0] = c
    embedding[:, 1] = room
    embedding[top, 1] = (room * room - u.square().sum(1)).sqrt()
    embedding[top, 2 : 2 + u.shape[1]] = u
    head[:, 0] = (log_p - log_p.mean()) / c
    head[top, 2 : 2 + v.shape[1]] = v
    return embedding, head


def pointwise_information(tokens: Tensor, top: Tensor, vocab_size: int, k: float) -> Tensor:
    """M (m, m) among the m tokens in top, fp32."""
    m = len(top)
    rank = torch.full((vocab_size,), m).scatter(0, top, torch.arange(m))
    ranks = rank[tokens]
    pairs = (ranks[:-1] < m) & (ranks[1:] < m)
    n = torch.bincount(ranks[:-1][pairs] * m + ranks[1:][pairs], minlength=m * m).view(m, m).float()
    p = (n.sum(0) + 0.1) / (n.sum() + 0.1 * m)
    return ((n / p + k) / (n.sum(1, keepdim=True) + k)).log()


def factors(
    matrix: Tensor, weights: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """U (m, r), V (m, r), r = min(rank, m), with U V^T near the matrix where weights are large.

    Randomised singular value decomposition with two power iterations (Halko, Martinsson and Tropp
    2011, algorithm 5.1); the singular values are shared evenly and a random rotation spreads them
    over the channels.
    """
    m = len(matrix)
    r = min(rank, m)
    w = (weights / weights.sum()).sqrt()[:, None]
    a = w * matrix * w.T
    y = a @ torch.randn(m, min(m, r + 10), generator=generator)
    for _ in range(2):
        y = a @ (a.T @ torch.linalg.qr(y).Q)
    q = torch.linalg.qr(y).Q
    left, values, right = torch.linalg.svd(q.T @ a, full_matrices=False)
    root = values[:r].sqrt()
    rotation = torch.linalg.qr(torch.randn(r, r, generator=generator)).Q
    return (q @ left)[:, :r] * root / w @ rotation, right[:r].T * root / w @ rotation

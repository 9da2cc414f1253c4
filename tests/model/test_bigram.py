"""With enough channels the untrained model is the smoothed bigram model, counted by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fastlm.bigram import bigram_tables
from fastlm.config import ModelConfig
from fastlm.errors import UserError
from fastlm.model import Transformer, build

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=12,
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=48,
    max_seq_len=64,
    tie_embeddings=False,
)


def text(n: int = 4000) -> torch.Tensor:
    """A Markov chain over 12 tokens with very different successors."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(12, 12, generator=generator) ** 4
    out = [0]
    for _ in range(n - 1):
        out.append(int(torch.multinomial(p[out[-1]], 1, generator=generator)))
    return torch.tensor(out)


def by_hand(tokens: torch.Tensor, k: float) -> torch.Tensor:
    """log p(j | i) of the smoothed bigram model, with loops."""
    ids = tokens.tolist()
    n = [[0.0] * 12 for _ in range(12)]
    for i, j in pairwise(ids):
        n[i][j] += 1
    share = [sum(n[i][j] for i in range(12)) + 0.1 for j in range(12)]
    p = [s / sum(share) for s in share]
    return torch.tensor(
        [
            [math.log(p[j] * (n[i][j] / p[j] + k) / (sum(n[i]) + k)) for j in range(12)]
            for i in range(12)
        ]
    )


def test_an_untrained_model_is_the_smoothed_bigram_model():
    tokens = text()
    model = build(CONFIG, 0, CPU, tokens)
    predicted = model.logits(torch.arange(12)[:, None])[:, 0].log_softmax(-1)
    expected = by_hand(tokens, 100.0).log_softmax(-1)
    assert (predicted - expected).abs().max() < 0.05  # the longest rows are shortened a little
    assert (expected - expected.mean(0)).abs().max() > 1.5  # and there was something to get right


def test_fewer_channels_do_better_than_single_tokens_and_worse_than_all():
    tokens = text()
    losses = {}
    for dim in (4, 8, 32):
        embedding, head = bigram_tables(tokens, 12, dim, torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            embedding.norm(dim=1), torch.full((12,), dim**0.5), rtol=1e-4, atol=0
        )
        losses[dim] = torch.nn.functional.cross_entropy(
            embedding[tokens[:-1]] @ head.T, tokens[1:]
        ).item()
    share = torch.bincount(tokens, minlength=12) / len(tokens)
    unigram = -(share * share.log()).sum().item()
    assert losses[32] < losses[8] < losses[4] < unigram


def test_tokens_outside_the_frequent_ones_start_with_their_share_alone():
    tokens = torch.cat([text(), torch.tensor([13])])
    embedding, head = bigram_tables(tokens, 20, 16, torch.Generator().manual_seed(0), frequent=12)
    rare = (embedding[13] @ head.T).log_softmax(-1)
    share = torch.bincount(tokens, minlength=20) + 0.1
    torch.testing.assert_close(rare, (share / share.sum()).log(), rtol=1e-4, atol=1e-4)


def test_everything_but_the_tables_starts_as_without_statistics():
    plain, counted = build(CONFIG, 0, CPU), build(CONFIG, 0, CPU, text())
    for (name, a), b in zip(plain.named_parameters(), counted.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in ("embedding", "head")), name
    again = build(CONFIG, 0, CPU, text())
    assert torch.equal(counted.embedding, again.embedding)
    assert counted.embedding[12:].abs().max() == counted.head[12:].abs().max() == 0


def test_tied_embeddings_cannot_hold_two_tables():
    with pytest.raises(UserError, match="needs an untied head"):
        build(replace(CONFIG, tie_embeddings=True), 0, CPU, text())
    assert isinstance(build(CONFIG, 0, CPU), Transformer)

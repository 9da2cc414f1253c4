"""With enough channels the untrained model is the smoothed bigram model, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from fastlm.config import ModelConfig
from fastlm.errors import UserError
from fastlm.model import Transformer, build
from fastlm.train.token_statistics.bigram import bigram_tables, initialise_from_bigrams

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


def from_bigrams(config: ModelConfig, tokens: torch.Tensor) -> Transformer:
    return build(config, 0, CPU, partial(initialise_from_bigrams, text=tokens))


def by_hand(tokens: torch.Tensor, k: float) -> torch.Tensor:
    """log p(j | i) of the smoothed bigram model, with loops."""
    ids = tokens.tolist()
    n = [[0.0] * 12 for _ in range(12)]
    for i, j in pairwise(ids):
        n[i][j] += 1
    share = [sum(n[i][j] for i in range(12)) + 0.1 for j in range(12)]
    p = [s / sum(share) for s in share]
    rows = [[p[j] * (n[i][j] / p[j] + k) / (sum(n[i]) + k) for j in range(12)] for i in range(12)]
    return torch.tensor(rows).log()


def test_an_untrained_model_is_the_smoothed_bigram_model():
    tokens = text()
    model = from_bigrams(CONFIG, tokens)
    predicted = model.logits(torch.arange(12)[:, None])[:, 0].log_softmax(-1)
    expected = by_hand(tokens, 100.0).log_softmax(-1)
    assert (predicted - expected).abs().max() < 0.05  # the longest rows are shortened a little
    assert (expected - expected.mean(0)).abs().max() > 1.5  # and there was something to get right


def test_fewer_channels_do_better_than_single_tokens_and_worse_than_all():
    tokens = text()
    losses = {}
    for dim in (4, 8, 32):
        embedding, head = bigram_tables(tokens, 12, dim, torch.Generator().manual_seed(0))
        norms = embedding.norm(dim=1)
        torch.testing.assert_close(norms, torch.full((12,), dim**0.5), rtol=1e-4, atol=0)
        logits = embedding[tokens[:-1]] @ head.T
        losses[dim] = torch.nn.functional.cross_entropy(logits, tokens[1:]).item()
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
    plain, counted = build(CONFIG, 0, CPU), from_bigrams(CONFIG, text())
    for (name, a), b in zip(plain.named_parameters(), counted.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in ("embedding", "head")), name
    again = from_bigrams(CONFIG, text())
    assert torch.equal(counted.embedding, again.embedding)
    assert counted.embedding[12:].abs().max() == counted.head[12:].abs().max() == 0


def test_tied_embeddings_cannot_hold_two_tables():
    with pytest.raises(UserError, match="needs an untied head"):
        from_bigrams(replace(CONFIG, tie_embeddings=True), text())
    assert isinstance(build(CONFIG, 0, CPU), Transformer)

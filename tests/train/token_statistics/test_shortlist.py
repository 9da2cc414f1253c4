"""The shortlist's softmax: targets survive, the estimate of the partition is unbiased, and a full
draw is the full softmax.
"""

from __future__ import annotations

import pytest
import torch
from helpers.models import randomised

from fastlm.config import ModelConfig
from fastlm.data import IGNORED
from fastlm.train.token_statistics.shortlist import by_frequency, draw, loss_over

V = 50


def ranked() -> torch.Tensor:
    return by_frequency(
        torch.randint(V, (500,), generator=torch.Generator().manual_seed(0)) ** 2 // V, V
    )


def test_by_frequency_counts():
    assert by_frequency(torch.tensor([3, 1, 3, 3, 1, 0]), 5).tolist() == [3, 1, 0, 2, 4]


def test_every_target_is_among_the_candidates_at_its_index():
    targets = torch.tensor([[4, 49, IGNORED], [49, 37, 0]])
    ids, offsets, indices = draw(ranked(), targets, 14, seed=1, draw_number=2)
    assert ids.shape == offsets.shape == (20,)
    counted = targets != IGNORED
    assert torch.equal(ids[indices[counted]], targets[counted])
    assert (indices[~counted] == IGNORED).all()
    assert offsets[indices[counted]].abs().max() == 0
    assert torch.equal(ids[:14], ranked()[:14])


def test_draws_avoid_what_is_already_there_and_repeat_with_the_seed():
    targets = torch.tensor([7, 8, IGNORED, IGNORED, IGNORED, IGNORED])
    ids, offsets, _ = draw(ranked(), targets, 14, 1, 2)
    drawn, kept = ids[offsets > 0], ids[offsets == 0]
    assert len(drawn) >= 4
    assert not set(drawn.tolist()) & set(kept.tolist())
    assert len(kept) == len(kept.unique())
    assert all(
        torch.equal(a, b)
        for a, b in zip(draw(ranked(), targets, 14, 1, 2), (ids, offsets, _), strict=True)
    )
    assert not torch.equal(draw(ranked(), targets, 14, 1, 3)[0], ids)


def test_the_estimate_of_the_partition_is_unbiased():
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    targets = torch.tensor([4, 49, 37, 0, 3, 11, IGNORED, IGNORED])
    sums = torch.stack(
        [
            (logits[ids] + offsets).exp().sum()
            for ids, offsets, _ in (draw(ranked(), targets, 12, 0, i) for i in range(3000))
        ]
    )
    standard_error = sums.std() / len(sums) ** 0.5
    assert abs(sums.mean() - logits.exp().sum()) < 4 * standard_error
    assert standard_error < 0.02 * logits.exp().sum()


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_candidates_logits(tied):
    """Value and gradients, from the whole vocabulary's logits with the candidates' picked."""
    config = ModelConfig(
        vocab_size=V,
        dim=16,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        ffn_dim=24,
        max_seq_len=16,
        tie_embeddings=tied,
    )
    model = randomised(config)
    tokens = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1).clone()
    targets[0, 2] = IGNORED
    found = draw(ranked(), targets, 14, 1, 2)
    logits = model.logits(tokens).flatten(0, 1)[:, found.ids] + found.logit_offsets
    expected = torch.nn.functional.cross_entropy(logits, found.targets.flatten(), reduction="sum")
    loss = loss_over(model, tokens, found.targets, 0.0, found.ids, found.logit_offsets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    grads = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_shortlist_as_long_as_the_vocabulary_is_refused():
    with pytest.raises(AssertionError, match="shorter than the vocabulary"):
        draw(ranked(), torch.zeros(20, dtype=torch.long), 30, 0, 0)

"""The shortlist's softmax: targets survive, the estimate of the partition is unbiased, and a full
draw is the full softmax.
"""

from __future__ import annotations

import pytest
import torch

from fastlm.data import IGNORED
from fastlm.train.shortlist import by_frequency, draw

V = 50


def ranked() -> torch.Tensor:
    return by_frequency(
        torch.randint(V, (500,), generator=torch.Generator().manual_seed(0)) ** 2 // V, V
    )


def test_by_frequency_counts():
    assert by_frequency(torch.tensor([3, 1, 3, 3, 1, 0]), 5).tolist() == [3, 1, 0, 2, 4]


def test_every_target_is_among_the_candidates_at_its_index():
    targets = torch.tensor([[4, 49, IGNORED], [49, 37, 0]])
    ids, raised, indices = draw(ranked(), targets, 14, seed=1, draw_number=2)
    assert ids.shape == raised.shape == (20,)
    counted = targets != IGNORED
    assert torch.equal(ids[indices[counted]], targets[counted])
    assert (indices[~counted] == IGNORED).all()
    assert raised[indices[counted]].abs().max() == 0
    assert torch.equal(ids[:14], ranked()[:14])


def test_draws_avoid_what_is_already_there_and_repeat_with_the_seed():
    targets = torch.tensor([7, 8, IGNORED, IGNORED, IGNORED, IGNORED])
    ids, raised, _ = draw(ranked(), targets, 14, 1, 2)
    drawn, kept = ids[raised > 0], ids[raised == 0]
    assert len(drawn) >= 4
    assert not set(drawn.tolist()) & set(kept.tolist())
    assert len(kept) == len(kept.unique())
    assert all(
        torch.equal(a, b)
        for a, b in zip(draw(ranked(), targets, 14, 1, 2), (ids, raised, _), strict=True)
    )
    assert not torch.equal(draw(ranked(), targets, 14, 1, 3)[0], ids)


def test_the_estimate_of_the_partition_is_unbiased():
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    targets = torch.tensor([4, 49, 37, 0, 3, 11, IGNORED, IGNORED])
    sums = torch.stack(
        [
            (logits[ids] + raised).exp().sum()
            for ids, raised, _ in (draw(ranked(), targets, 12, 0, i) for i in range(3000))
        ]
    )
    standard_error = sums.std() / len(sums) ** 0.5
    assert abs(sums.mean() - logits.exp().sum()) < 4 * standard_error
    assert standard_error < 0.02 * logits.exp().sum()


def test_a_shortlist_as_long_as_the_vocabulary_is_refused():
    with pytest.raises(AssertionError, match="shorter than the vocabulary"):
        draw(ranked(), torch.zeros(20, dtype=torch.long), 30, 0, 0)

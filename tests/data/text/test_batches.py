"""Rows and their order: without replacement, from one counter, however the work is split."""

import numpy as np
import pytest

from fastlm.data import IGNORED
from fastlm.data.order import mix64, permutation_keys, permute
from fastlm.data.text.batches import row_batch, validation_batches
from fastlm.data.text.tokens import Tokens
from fastlm.errors import UserError


def make_tokens(count):
    return Tokens([np.arange(count, dtype=np.uint32)], np.array([count]), 0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permutation_visits_everything_once_and_epochs_differ(size):
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        keys = permutation_keys(seed, epoch)
        order = [permute(n, size, keys) for n in range(size)]
        assert sorted(order) == list(range(size))
        orders.append(order)
    if size > 60:
        assert orders[0] != orders[1] != orders[2] != orders[0]


def test_permutation_looks_random():
    size, n_keys = 97, 2000
    counts = np.zeros((size, size))
    for seed in range(n_keys):
        keys = permutation_keys(seed, 0)
        counts[np.arange(size), [permute(n, size, keys) for n in range(size)]] += 1
    expected = n_keys / size
    chi2 = ((counts - expected) ** 2 / expected).sum()  # (size - 1)^2 degrees of freedom
    degrees = (size - 1) ** 2
    assert abs(chi2 - degrees) < 6 * (2 * degrees) ** 0.5
    # Neighbours do not stay neighbours: mean distance of consecutive images is that of random
    # pairs, size / 3.
    keys = permutation_keys(5, 0)
    image = np.array([permute(n, 10_000, keys) for n in range(10_000)])
    assert abs(np.abs(np.diff(image)).mean() / 10_000 - 1 / 3) < 0.01


def test_an_epoch_has_every_target_once_and_targets_follow_inputs():
    tokens, seq_len = make_tokens(1000), 16
    n_rows = tokens.rows(seq_len)
    for epoch in range(3):
        x, y = row_batch(tokens, epoch * n_rows, n_rows, seq_len, seed=3)
        assert (y - x == 1).all()
        targets = np.sort(y.numpy().ravel())
        assert len(np.unique(targets)) == n_rows * seq_len
        # Contiguous: nothing skipped inside.
        assert targets[-1] - targets[0] == n_rows * seq_len - 1


def test_order_is_the_same_for_any_ranks_micro_batches_and_resume():
    tokens, seq_len, total = make_tokens(5000), 32, 480  # more than three epochs
    whole, _ = row_batch(tokens, 0, total, seq_len, seed=7)
    for n_ranks, micro in ((1, 1), (1, 8), (2, 4), (4, 2), (8, 3)):
        rows = np.full((total, seq_len), -1)
        for step_start in range(0, total, n_ranks * micro):
            for rank in range(n_ranks):
                x, _ = row_batch(
                    tokens,
                    step_start + rank * micro,
                    min(micro, total - step_start),
                    seq_len,
                    seed=7,
                )
                rows[step_start + rank * micro : step_start + (rank + 1) * micro] = x[
                    : total - step_start - rank * micro
                ]
        assert (rows == whole.numpy()).all()
    resumed, _ = row_batch(tokens, 200, 280, seq_len, seed=7)
    assert (resumed == whole[200:]).all()


def test_another_seed_is_another_order():
    tokens = make_tokens(5000)
    assert tokens.row_starts(0, 50, 32, 0) != tokens.row_starts(0, 50, 32, 1)


def test_sequence_longer_than_the_data_is_refused():
    assert row_batch(make_tokens(33), 0, 2, 32, 0)[0].shape == (2, 32)
    with pytest.raises(UserError, match="longer than the data"):
        row_batch(make_tokens(32), 0, 1, 32, 0)
    with pytest.raises(UserError, match="at least 1"):
        row_batch(make_tokens(32), 0, 1, 0, 0)


@pytest.mark.parametrize(
    ("count", "seq_len", "rows"), [(2, 8, 4), (100, 8, 4), (97, 8, 4), (65, 8, 4), (33, 32, 1)]
)
def test_validation_scores_every_token_but_the_first_once(count, seq_len, rows):
    seen = []
    for tokens in (make_tokens(count), make_tokens(count)[:]):
        for x, y in validation_batches(tokens, seq_len, rows):
            assert x.shape == y.shape == (rows, seq_len)
            counted = y != IGNORED
            assert (y[counted] - x[counted] == 1).all()
            seen += y[counted].tolist()
    assert seen == list(range(1, count)) * 2


def test_mixing_depends_on_every_number():
    assert len({mix64(a, b, c) for a in range(8) for b in range(8) for c in range(8)}) == 512
    assert mix64(-1) == mix64((1 << 64) - 1)

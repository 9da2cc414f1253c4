"""Rows for training and validation, drawn from one counter: nothing but the position needs to be saved to resume.

Epoch e of a text of N tokens is cut into floor((N - 1) / T) contiguous rows of T + 1 tokens that overlap by one (row r gives
inputs [r T, r T + T) and targets shifted by one), starting at a phase of its own so that the leftover is not always the same.
Row number p of the run is row perm_e(p mod n_rows) of epoch e = p // n_rows, where perm_e is a Feistel network keyed by
(seed, e) with cycle walking (Black and Rogaway 2002): a permutation computed for any index alone, never stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from fastlm.data.tokens import Tokens
from fastlm.errors import UserError

IGNORED = -100
_ROUNDS = 6  # even, so that the halves end with the widths they began with
_MASK = (1 << 64) - 1


def rows_per_epoch(tokens: Tokens, seq_len: int) -> int:
    """Rows of seq_len tokens in one pass; UserError where the text is shorter than one row."""
    if seq_len < 1:
        raise UserError(f"sequence length: got {seq_len}; expected at least 1")
    n_rows = (len(tokens) - 1) // seq_len
    if n_rows < 1:
        raise UserError(f"sequence length {seq_len} is longer than the data ({tokens.name}: {len(tokens):,} tokens, one row "
                        f"needs {seq_len + 1:,}); shorten the sequence or give more text")  # fmt: skip
    return n_rows


def row_starts(tokens: Tokens, position: int, count: int, seq_len: int, seed: int) -> list[int]:
    """First token of rows position, ..., position + count - 1 of the run."""
    n_rows = rows_per_epoch(tokens, seq_len)
    spare = (len(tokens) - 1) % seq_len
    starts = []
    for epoch, numbers in itertools.groupby(range(position, position + count), lambda number: number // n_rows):
        keys = permutation_keys(seed, epoch)
        phase = mix64(seed, epoch, 0) % (spare + 1)
        starts += [permute(number % n_rows, n_rows, keys) * seq_len + phase for number in numbers]
    return starts


def row_batch(tokens: Tokens, position: int, count: int, seq_len: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows position ... position + count - 1 of the run: inputs and targets, each (count, seq_len) int64.

    position counts the rows drawn so far in the whole run, over all ranks and micro-batches. Every slot is a real token;
    within an epoch no token is a target twice. Raises UserError where the sequence is longer than the data.
    """
    rows = np.empty((count, seq_len + 1), np.int64)
    for row, start in zip(rows, row_starts(tokens, position, count, seq_len, seed), strict=True):
        row[:] = tokens[start : start + seq_len + 1]
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def permutation_keys(seed: int, epoch: int) -> list[int]:
    """Round keys of the permutation of one epoch."""
    return [mix64(seed, epoch, 1 + n) for n in range(_ROUNDS)]


def permute(index: int, size: int, keys: list[int]) -> int:
    """Where `index` goes in a pseudo-random permutation of range(size): an alternating Feistel network, cycle walking.

    The block is the smallest power of two that holds the size, so an index walks twice at most on average. Plain integers:
    for a handful of rows they are faster than numpy (0.02 ms a row at worst).
    """
    bits = max(2, (size - 1).bit_length())
    low, high = bits // 2, bits - bits // 2
    while True:
        left, right, n_left, n_right = index >> low, index & ((1 << low) - 1), high, low
        for key in keys:
            mixed = ((right ^ key) * 0x9E3779B97F4A7C15 & _MASK) >> (64 - n_left)
            left, right, n_left, n_right = right, left ^ mixed, n_right, n_left
        index = left << low | right
        if index < size:
            return index


def mix64(*numbers: int) -> int:
    """64 well-mixed bits of some integers (the finaliser of SplitMix64, chained)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def validation_batches(tokens: Tokens | np.ndarray, seq_len: int, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All non-overlapping windows of a text, (rows, seq_len) int64 each: every token but the first is a target once.

    The last window is short and the last batch may lack rows; both are filled with token 0 and target -100, so that all
    batches have one shape (a compiled model is not compiled again). A slice of Tokens (an array) will do. Raises
    UserError where there is no target at all.
    """
    if len(tokens) < 2:
        raise UserError(f"validation text: {len(tokens)} tokens; expected at least 2")
    per_batch = rows * seq_len
    for start in range(0, len(tokens) - 1, per_batch):
        part = np.asarray(tokens[start : start + per_batch + 1], np.int64)
        x = np.zeros(per_batch, np.int64)
        y = np.full(per_batch, IGNORED, np.int64)
        x[: len(part) - 1] = part[:-1]
        y[: len(part) - 1] = part[1:]
        yield torch.from_numpy(x).view(rows, seq_len), torch.from_numpy(y).view(rows, seq_len)

"""The order of things from a counter alone: a keyed permutation computed for any index, never stored.

A Feistel network over the smallest power of two that holds the size, with cycle walking (Black and Rogaway 2002, "Ciphers
with arbitrary finite domains"): a bijection of range(size) for any round function.
"""

from __future__ import annotations

from collections.abc import Sized

from fastlm.errors import UserError

_ROUNDS = 6  # even, so that the halves end with the widths they began with
_MASK = (1 << 64) - 1


def rows_per_epoch(tokens: Sized, seq_len: int) -> int:
    """Rows of seq_len tokens in one pass; UserError where the text is shorter than one row."""
    if seq_len < 1:
        raise UserError(f"sequence length: got {seq_len}; expected at least 1")
    n_rows = (len(tokens) - 1) // seq_len
    if n_rows < 1:
        name = getattr(tokens, "name", "text")
        raise UserError(f"sequence length {seq_len} is longer than the data ({name}: {len(tokens):,} tokens, one row needs "
                        f"{seq_len + 1:,}); shorten the sequence or give more text")  # fmt: skip
    return n_rows


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

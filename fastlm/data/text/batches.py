"""Rows for training and validation, drawn from one counter: nothing but the position needs to be saved to resume.

Epoch e of a text of N tokens is cut into floor((N - 1) / T) contiguous rows of T + 1 tokens that overlap by one (row r gives
inputs [r T, r T + T) and targets shifted by one), starting at a phase of its own so that the leftover is not always the same.
Row number p of the run is row perm_e(p mod n_rows) of epoch e = p // n_rows (fastlm.data.order).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from fastlm.data.order import mix64, permutation_keys, permute, rows_per_epoch
from fastlm.data.text.mixture import Mixture, draw, quotas
from fastlm.data.text.tokens import Tokens
from fastlm.errors import UserError

IGNORED = -100


def row_starts(tokens: Tokens, position: int, count: int, seq_len: int, seed: int) -> list[int]:
    """First token of rows position, ..., position + count - 1 of the run."""
    n_rows = rows_per_epoch(tokens, seq_len)
    starts = []
    for epoch, numbers in itertools.groupby(range(position, position + count), lambda number: number // n_rows):
        keys = permutation_keys(seed, epoch)
        first = phase(tokens, epoch, seq_len, seed)
        starts += [permute(number % n_rows, n_rows, keys) * seq_len + first for number in numbers]
    return starts


def phase(tokens: Tokens, epoch: int, seq_len: int, seed: int) -> int:
    """The token that an epoch's first row starts at."""
    spare = (len(tokens) - 1) % seq_len
    return mix64(seed, epoch, 0) % (spare + 1)


def row_batch(
    tokens: Tokens | Mixture, position: int, count: int, seq_len: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows position ... position + count - 1 of the run: inputs and targets, each (count, seq_len) int64.

    position counts the rows drawn so far in the whole run, over all ranks and micro-batches. Every slot is a real token;
    within an epoch no token is a target twice. A Mixture gives each row from the source whose turn it is. Raises
    UserError where the sequence is longer than the data.
    """
    rows = np.empty((count, seq_len + 1), np.int64)
    if isinstance(tokens, Mixture):
        weights = tokens.weights(seq_len)
        for row, number in zip(rows, range(position, position + count), strict=True):
            source, place = draw(number, weights)
            part = tokens.parts[source]
            start = row_starts(part, place, 1, seq_len, mix64(seed, source))[0]
            row[:] = part[start : start + seq_len + 1]
    else:
        for row, start in zip(rows, row_starts(tokens, position, count, seq_len, seed), strict=True):
            row[:] = tokens[start : start + seq_len + 1]
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


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


def isolate_documents(
    x: torch.Tensor, y: torch.Tensor, eos_id: int, room: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """What keeps the documents of rows apart: targets, positions, cu_seqlens and max_seqlen.

    x, y: (B, T) int64 from `row_batch`, before they go to a device (counting documents there would
    make the host wait). A document ends with its end-of-text in x, or with the row. Returned y
    ignores the target of each end-of-text (the next document's first token, which nothing
    foretells); positions (B, T) restart at 0 in each document; cu_seqlens, int32, are its
    boundaries in the rows laid end to end, the last one repeated up to room + 1 of them, so that a
    compiled model meets one shape; max_seqlen is T. More documents than room, which text with
    end-of-text inside documents may have, get a power of two of boundaries: none is dropped.
    """
    starts = torch.ones_like(x, dtype=torch.bool)
    starts[:, 1:] = x[:, :-1] == eos_id
    first = starts.flatten().nonzero().flatten()  # (documents,)
    positions = torch.arange(x.numel()) - first[starts.flatten().cumsum(0) - 1]
    if len(first) > room:
        room = 1 << (len(first) - 1).bit_length()
    cu_seqlens = torch.full((room + 1,), x.numel(), dtype=torch.int32)
    cu_seqlens[: len(first)] = first
    return torch.where(x == eos_id, IGNORED, y), positions.view(x.shape), cu_seqlens, x.shape[1]


def most_documents(
    tokens: Tokens | Mixture,
    rows: range,
    seq_len: int,
    seed: int,
) -> int:
    """The most documents that a batch of a run may hold.

    rows: positions of the batches, rows.step rows each. Counted from the documents' ends, not from
    the tokens; seed as in `row_batch`.
    """
    if isinstance(tokens, Tokens):
        return most_in_rows(documents_in_rows(tokens, rows.stop, seq_len, seed), rows.step)
    weights = tokens.weights(seq_len)
    drawn = np.array([quotas(n, weights) for n in [*rows, rows.stop]])
    most = 0
    for source, part in enumerate(tokens.parts):
        stop = int(drawn[-1, source])
        found = documents_in_rows(part, stop, seq_len, mix64(seed, source))
        most += most_in_rows(found, int(np.diff(drawn[:, source]).max()))
    return most


def most_in_rows(documents: np.ndarray, count: int) -> int:
    return int(np.sort(documents)[len(documents) - min(count, len(documents)) :].sum())


def documents_in_rows(tokens: Tokens, stop: int, seq_len: int, seed: int) -> np.ndarray:
    """Documents, or parts of them, in each row of the epochs that the first `stop` rows reach."""
    n_rows = rows_per_epoch(tokens, seq_len)
    found = []
    for epoch in range(-(-stop // n_rows)):
        starts = np.arange(n_rows) * seq_len + phase(tokens, epoch, seq_len, seed)
        before = np.searchsorted(tokens.document_ends, starts, side="right")
        behind = np.searchsorted(tokens.document_ends, starts + seq_len - 1, side="right")
        found.append(1 + behind - before)
    return np.concatenate(found) if found else np.zeros(0, np.int64)

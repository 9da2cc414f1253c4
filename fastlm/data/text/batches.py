"""Batches of rows for training and windows for validation.

Rows follow from one counter: nothing but the position needs to be saved to resume.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastlm.data import IGNORED
from fastlm.data.text.tokens import Tokens, TokenSource
from fastlm.errors import UserError


def row_batch(
    tokens: TokenSource, position: int, count: int, seq_len: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows position ... position + count - 1 of the run: inputs and targets.

    Each is (count, seq_len) int64. position counts the rows drawn so far in the whole run, over all
    ranks and micro-batches. Every slot is a real token; within an epoch no token is a target twice.
    Raises UserError where the sequence is longer than the data.
    """
    both = torch.from_numpy(tokens.rows_at(position, count, seq_len, seed))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def validation_batches(
    tokens: Tokens | np.ndarray, seq_len: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All non-overlapping windows of a text: every token but the first is a target once.

    Inputs and targets are (rows, seq_len) int64 each. The last window is short and the last batch
    may lack rows; both are filled with token 0 and target -100, so that all batches have one shape
    (a compiled model is not compiled again). A slice of Tokens (an array) will do. Raises UserError
    where there is no target at all.
    """
    if len(tokens) < 2:
        raise UserError(f"validation text: {len(tokens)} tokens; expected at least 2")
    per_batch = rows * seq_len
    for start in range(0, len(tokens) - 1, per_batch):
        ids = np.asarray(tokens[start : start + per_batch + 1], np.int64)
        x = np.zeros(per_batch, np.int64)
        y = np.full(per_batch, IGNORED, np.int64)
        x[: len(ids) - 1] = ids[:-1]
        y[: len(ids) - 1] = ids[1:]
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

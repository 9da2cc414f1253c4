"""Tokenising many texts at once, in order.

Threads, not processes: tiktoken and tokenizers work outside Python's lock, there is nothing to
start or to copy, and the main thread only reads text and writes ids. Memory holds a few batches per
thread, however long the text is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from fastlm.data.text.documents import Piece
from fastlm.tokenizer import Tokenizer


class EncodedBatch(NamedTuple):
    """A batch of pieces, the ids of each, and how many bytes of UTF-8 their text has."""

    pieces: list[Piece]
    ids: list[np.ndarray]
    text_bytes: int


def encode_batches(
    tokenizer: Tokenizer,
    batches: Iterator[list[Piece]],
    dtype: np.dtype,
    workers: int | None = None,
) -> Iterator[EncodedBatch]:
    """Tokenise batches in parallel.

    The order and the ids are the same for any number of workers (None: one per core).
    """

    def encode(batch: list[Piece]) -> EncodedBatch:
        ids = [tokenizer.encode_array(piece.text).astype(dtype) for piece in batch]
        size = sum(
            len(p.text) if p.text.isascii() else len(p.text.encode("utf-8", "replace"))
            for p in batch
        )
        return EncodedBatch(batch, ids, size)

    workers = workers or usable_cores()
    waiting: deque[Future[EncodedBatch]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(encode, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Tokenising many texts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastlm.data.sources import Piece
from fastlm.tokenizer import Tokenizer


def encode_batches(
    tokenizer: Tokenizer, batches: Iterator[list[Piece]], workers: int | None = None
) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Each batch with the ids of its pieces, in the order given."""
    for batch in batches:
        yield batch, [tokenizer.encode_array(piece.text) for piece in batch]

"""Dropping documents that were seen before: the same text, or nearly the same.

Exact: equal after case and white space are evened out (BLAKE2b of 16 bytes, remembered per
document). Near: MinHash over 5-word shingles with locality-sensitive hashing at a Jaccard
similarity of 0.8 (Broder 1997; Lee et al. 2022, "Deduplicating training data makes language models
better", use the same), by the library datasketch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastlm.data.text.documents import Piece
from fastlm.errors import UserError

NEAR_SIMILARITY = 0.8
SHINGLE_WORDS = 5
PERMUTATIONS = 128


@dataclass
class Duplicates:
    """Which duplicates to drop ("none", "exact" or "near", exact ones too), and how many were."""

    mode: str = "none"
    exact: int = 0
    near: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("none", "exact", "near"):
            raise UserError(f'duplicates: got {self.mode!r}; expected "none", "exact" or "near"')


def drop_duplicates(documents: Iterator[Piece], duplicates: Duplicates) -> Iterator[Piece]:
    """The whole documents of which no earlier one is a duplicate, in order."""
    seen: set[bytes] = set()
    index = _near_index() if duplicates.mode == "near" else None
    for number, piece in enumerate(documents):
        words = piece.text.lower().split()
        digest = hashlib.blake2b(
            " ".join(words).encode("utf-8", "replace"), digest_size=16
        ).digest()
        if digest in seen:
            duplicates.exact += 1
            continue
        seen.add(digest)
        if index is not None and len(words) >= SHINGLE_WORDS:
            sketch = _sketch(words)
            if index.query(sketch):
                duplicates.near += 1
                continue
            index.insert(number, sketch, check_duplication=False)
        yield piece


def _near_index() -> Any:
    try:
        from datasketch import MinHashLSH
    except ImportError:
        raise UserError(
            "duplicates: near ones need the package datasketch (pip install 'fastlm[dedup]'); "
            "or drop only exact ones with --dedup exact"
        ) from None
    return MinHashLSH(threshold=NEAR_SIMILARITY, num_perm=PERMUTATIONS)


def _sketch(words: list[str]) -> Any:
    from datasketch import MinHash

    shingles = {
        " ".join(words[n : n + SHINGLE_WORDS]) for n in range(len(words) - SHINGLE_WORDS + 1)
    }
    sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
    sketch.update_batch([shingle.encode("utf-8", "replace") for shingle in sorted(shingles)])
    return sketch

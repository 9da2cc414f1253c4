"""Token shards being written: appended to, cut back to counts, split at the tail for validation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from fastlm import files
from fastlm.data.text.manifest import IndexEntry, ShardEntry, SplitEntry

SHARD_TOKENS = 1 << 27
LEAST_VALIDATION_TOKENS = 4096  # wanted where the text is long enough: a tenth of it at most
MOST_VALIDATION_TOKENS = 500_000  # taken from the tail
VALIDATION_SHARE = 0.03


@dataclass(frozen=True)
class Counts:
    """How much of a split is on the disk."""

    tokens: int = 0
    documents: int = 0


class SplitWriter:
    """Appends ids and document ends of one split to its files, which hold `counts` already."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, counts: Counts) -> None:
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.tokens = counts.tokens
        self.documents = counts.documents
        self._shard: BinaryIO | None = None
        self._index: BinaryIO = self.index_file.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def index_file(self) -> Path:
        """The file of document ends."""
        return self.folder / f"{self.split}.documents.bin"

    @property
    def n_shards(self) -> int:
        """Files of ids so far."""
        return -(-self.tokens // SHARD_TOKENS)

    def shard_file(self, number: int) -> Path:
        """The file of one shard."""
        return self.folder / f"{self.split}-{number:05d}.bin"

    def read_shard(self, number: int) -> np.ndarray:
        """The ids of one shard, mapped: only what is used of it is read."""
        return np.memmap(self.shard_file(number), self.dtype, mode="r")

    def append(self, ids: np.ndarray) -> None:
        """Add ids, opening the next shard when one is full."""
        while len(ids):
            room = SHARD_TOKENS - self.tokens % SHARD_TOKENS
            if self._shard is None:
                self._shard = self.shard_file(self.tokens // SHARD_TOKENS).open("ab")
            fitting = ids[:room]
            ids = ids[room:]
            self._shard.write(fitting.tobytes())
            self.tokens += len(fitting)
            if len(fitting) == room:
                files.sync(self._shard)
                self._shard.close()
                self._shard = None

    def end_document(self, eos_id: int) -> None:
        """Close a document with the end-of-text token."""
        self.append(np.array([eos_id], self.dtype))
        self._index.write(np.int64(self.tokens).tobytes())
        self.documents += 1

    def append_ends(self, ends: np.ndarray) -> None:
        """Note where documents end whose ids were appended."""
        self._index.write(ends.astype("<i8").tobytes())
        self.documents += len(ends)

    def flush(self) -> Counts:
        """Put everything on disk; what is there then."""
        if self._shard is not None:
            files.sync(self._shard)
        files.sync(self._index)
        return Counts(self.tokens, self.documents)

    def close(self) -> None:
        """Close the files."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None
        self._index.close()

    def truncate(self, counts: Counts) -> bool:
        """Cut the files to these counts; False where they are shorter than that."""
        self.tokens = counts.tokens
        self.documents = counts.documents
        sizes = {self.index_file: 8 * counts.documents}
        for number in range(self.n_shards):
            held = min(SHARD_TOKENS, counts.tokens - number * SHARD_TOKENS)
            sizes[self.shard_file(number)] = self.dtype.itemsize * held
        for file in self.folder.glob(f"{self.split}-*.bin"):
            if file not in sizes:
                file.unlink()
        for file, size in sizes.items():
            if not file.is_file() or file.stat().st_size < size:
                return False
            os.truncate(file, size)
        return True

    def entry(self) -> SplitEntry:
        """What the manifest says of the split: counts and digests of the files."""
        shards = []
        for number in range(self.n_shards):
            file = self.shard_file(number)
            held = min(SHARD_TOKENS, self.tokens - number * SHARD_TOKENS)
            shards.append(ShardEntry(file.name, held, files.sha256(file)))
        index = IndexEntry(self.index_file.name, self.documents, files.sha256(self.index_file))
        return SplitEntry(self.tokens, self.documents, shards, index)


def top_up_validation(
    folder: Path, writers: dict[str, SplitWriter], dtype: np.dtype, eos_id: int
) -> None:
    """Move the tail of training into validation where too little was held out.

    So it is for one long text. Whole documents are moved, or, where the last one alone is more than
    twice what is wanted, its end; what stays of that one in training is closed with an end-of-text
    of its own.
    """
    train = writers["train"]
    validation = writers["validation"]
    total = train.tokens + validation.tokens
    least = min(LEAST_VALIDATION_TOKENS, total // 10)
    if validation.tokens >= least:
        return
    wanted = (
        max(least, min(MOST_VALIDATION_TOKENS, int(total * VALIDATION_SHARE))) - validation.tokens
    )
    ends = np.fromfile(train.index_file, "<i8")
    # The first document that moves: the last one that starts where at least `wanted` tokens are
    # left.
    starts = np.concatenate([[0], ends[:-1]])
    document = int(np.searchsorted(starts, train.tokens - wanted, side="right")) - 1
    cut = int(starts[document])
    inside_document = train.tokens - cut > 2 * wanted or document == 0
    if inside_document:
        cut = train.tokens - wanted
    first_shard = cut // SHARD_TOKENS
    tail = np.concatenate(
        [train.read_shard(number) for number in range(first_shard, train.n_shards)]
    )
    tail = tail[cut - first_shard * SHARD_TOKENS :]
    with SplitWriter(
        folder, "validation", dtype, Counts(validation.tokens, validation.documents)
    ) as longer:
        longer.append(tail)
        longer.append_ends(ends[document:] - cut + validation.tokens)
        longer.flush()
    with SplitWriter(folder, "train", dtype, Counts(cut, document)) as shorter:
        shorter.truncate(Counts(cut, document))
        if inside_document:
            shorter.end_document(eos_id)
        shorter.flush()
    writers["validation"] = longer
    writers["train"] = shorter

"""Token shards being written: appended to, cut back to a journal's counts, and split at the tail for validation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastlm import files

SHARD_TOKENS = 1 << 27
VALIDATION_TOKENS = (4096, 500_000)  # wanted at least (a tenth of the text at most), taken at most from the tail
VALIDATION_SHARE = 0.03


class SplitWriter:
    """Appends ids and document ends of one split to its shards; `state` is its part of the journal."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, state: dict[str, int]) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.tokens, self.documents = state["tokens"], state["documents"]
        self._data: BinaryIO | None = None
        self._ends = self.index_file.open("ab")

    @property
    def index_file(self) -> Path:
        """The file of document ends."""
        return self.folder / f"{self.split}.documents.bin"

    def shard_file(self, number: int) -> Path:
        """The file of one shard."""
        return self.folder / f"{self.split}-{number:05d}.bin"

    def append(self, ids: np.ndarray) -> None:
        """Add ids, opening the next shard when one is full."""
        while len(ids):
            room = SHARD_TOKENS - self.tokens % SHARD_TOKENS
            if self._data is None:
                self._data = self.shard_file(self.tokens // SHARD_TOKENS).open("ab")
            part, ids = ids[:room], ids[room:]
            self._data.write(part.tobytes())
            self.tokens += len(part)
            if len(part) == room:
                files.sync(self._data)
                self._data.close()
                self._data = None

    def end_document(self, eos_id: int) -> None:
        """Close a document with the end-of-text token."""
        self.append(np.array([eos_id], self.dtype))
        self._ends.write(np.int64(self.tokens).tobytes())
        self.documents += 1

    def flush(self) -> dict[str, int]:
        """Put everything on disk; the counts for the journal."""
        for stream in filter(None, (self._data, self._ends)):
            files.sync(stream)
        return {"tokens": self.tokens, "documents": self.documents}

    def close(self) -> None:
        """Close the files."""
        for stream in filter(None, (self._data, self._ends)):
            stream.close()
        self._data = None

    def truncate(self, tokens: int, documents: int) -> bool:
        """Cut the files to these counts; False where they are shorter than that."""
        n_shards = -(-tokens // SHARD_TOKENS)
        sizes = {self.shard_file(n): self.dtype.itemsize * min(SHARD_TOKENS, tokens - n * SHARD_TOKENS)
                 for n in range(n_shards)}  # fmt: skip
        sizes[self.index_file] = 8 * documents
        for file in self.folder.glob(f"{self.split}-*.bin"):
            if file not in sizes:
                file.unlink()
        for file, size in sizes.items():
            if not file.is_file() or file.stat().st_size < size:
                return False
            os.truncate(file, size)
        self.tokens, self.documents = tokens, documents
        return True

    def manifest(self) -> dict[str, Any]:
        """Counts and hashes of the files."""
        shards = []
        for n in range(-(-self.tokens // SHARD_TOKENS)):
            file = self.shard_file(n)
            count = min(SHARD_TOKENS, self.tokens - n * SHARD_TOKENS)
            shards.append({"file": file.name, "tokens": count, "sha256": files.sha256(file)})
        index = {"file": self.index_file.name, "documents": self.documents, "sha256": files.sha256(self.index_file)}
        return {"tokens": self.tokens, "documents": self.documents, "shards": shards, "index": index}


def top_up_validation(folder: Path, writers: dict[str, SplitWriter], dtype: np.dtype, eos_id: int) -> None:
    """Move the tail of training into validation where held-out documents gave too little, as for one long text.

    Whole documents are moved, or, where the last one alone is more than twice what is wanted, its end; the part that stays
    in training is closed with an end-of-text of its own.
    """
    train, validation = writers["train"], writers["validation"]
    total = train.tokens + validation.tokens
    least, most = VALIDATION_TOKENS
    if validation.tokens >= min(least, total // 10):
        return
    want = max(min(least, total // 10), min(most, int(total * VALIDATION_SHARE))) - validation.tokens
    ends = np.fromfile(train.index_file, "<i8")
    # The first document of the tail: the last one that starts at or before the place where `want` tokens are left.
    starts = np.concatenate([[0], ends[:-1]])
    first = int(np.searchsorted(starts, train.tokens - want, side="right")) - 1
    cut = int(starts[first])
    inside = train.tokens - cut > 2 * want or first == 0
    if inside:
        cut = train.tokens - want
    tail = np.concatenate([_read(train, n, dtype) for n in range(cut // SHARD_TOKENS, -(-train.tokens // SHARD_TOKENS))])
    tail = tail[cut - cut // SHARD_TOKENS * SHARD_TOKENS :]
    moved_ends = ends[first:] - cut + validation.tokens
    resumed = SplitWriter(folder, "validation", dtype, {"tokens": validation.tokens, "documents": validation.documents})
    resumed.append(tail)
    resumed._ends.write(moved_ends.astype("<i8").tobytes())
    resumed.documents += len(moved_ends)
    resumed.flush()
    resumed.close()
    validation.tokens, validation.documents = resumed.tokens, resumed.documents
    train.truncate(cut, first)
    if inside:
        resumed = SplitWriter(folder, "train", dtype, {"tokens": cut, "documents": first})
        resumed.end_document(eos_id)
        resumed.flush()
        resumed.close()
        train.tokens, train.documents = resumed.tokens, resumed.documents


def _read(writer: SplitWriter, number: int, dtype: np.dtype) -> np.ndarray:
    """One shard, mapped: only what is used of it is read."""
    return np.memmap(writer.shard_file(number), dtype, mode="r")

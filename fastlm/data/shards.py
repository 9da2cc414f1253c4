"""Text to token shards: tokenised once, written atomically, resumed after a kill, reused ever after.

    pieces of text -> batches of about 256 KB -> ids (in parallel) -> <folder>.partial/*.bin + journal.json -> <folder>/

The journal is written after the data it speaks of is on disk; a run that was killed truncates the data to the last journal
and goes on from there, so its result is byte-identical to that of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastlm.data.dedup import Duplicates, drop_duplicates
from fastlm.data.encode import encode_batches
from fastlm.data.sources import HELD_OUT_EVERY, Piece, Source, open_source
from fastlm.data.tokens import FORMAT, MANIFEST, TokenData, Tokens, file_sha256, open_data, open_tokens, unigram_perplexity
from fastlm.errors import UserError
from fastlm.tokenizer import Tokenizer

__all__ = ["Settings", "TokenData", "Tokens", "open_data", "open_tokens", "prepare", "unigram_perplexity"]

SHARD_TOKENS = 1 << 27
BATCH_CHARS = 1 << 18
JOURNAL_EVERY = 64  # batches
MIN_TOKENS = 256  # less than this is no text to train on
VALIDATION_TOKENS = (4096, 500_000)  # wanted at least (a tenth of the text at most), taken at most from the tail
VALIDATION_SHARE = 0.03

Progress = Callable[[int, int | None, int], None]


@dataclass(frozen=True)
class Settings:
    """What besides source and tokenizer decides the shards' content."""

    text_field: str = "text"
    on_bad_row: str = "fail"
    dedup: str = "none"


def prepare(
    source: str,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
    settings: Settings = Settings(),
    workers: int | None = None,
) -> TokenData:
    """Tokens of a source, from the cache where it holds them, else tokenised into it.

    source: a name for `open_source`, or a folder that `prepare` wrote. progress(bytes of text done, bytes in all or None,
    tokens so far) is called after each batch. workers: processes that tokenise (None: as many as cores, or none for a small
    text). The cache key is the source with its revision, the tokenizer's hash and the settings. Another process that
    prepares the same waits for the first. Raises UserError for anything wrong with the source, for text that is too short,
    and for a full or read-only disk.
    """
    ready = Path(source).expanduser()
    if (ready / MANIFEST).is_file():
        return open_data(ready, tokenizer)
    opened = open_source(source, settings.text_field, settings.on_bad_row)
    return prepare_source(opened, tokenizer, Path(cache), progress, settings, workers)


def prepare_source(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
    settings: Settings = Settings(),
    workers: int | None = None,
) -> TokenData:
    """`prepare` for a source that is already open."""
    key = [FORMAT, source.name, source.fingerprint, tokenizer.hash, asdict(settings)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    label = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(source.name).name or source.name).strip("-.") or "text"
    folder = cache / f"{label}-{digest}"
    return write_folder(source, tokenizer, folder, progress, settings, workers)


def write_folder(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    progress: Progress | None = None,
    settings: Settings = Settings(),
    workers: int | None = None,
) -> TokenData:
    """Tokenise a source into `folder`, unless it is already there."""
    if (folder / MANIFEST).is_file():
        return open_data(folder, tokenizer)
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock")):
            if not (folder / MANIFEST).is_file():  # another process may have written it while this one waited
                try:
                    _write(source, tokenizer, partial, progress, settings, workers)
                except UserError:
                    if source.size_bytes is not None:  # a mended file is another source; a hub is read on from here
                        shutil.rmtree(partial, ignore_errors=True)
                    raise
                partial.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{folder}: the disk is full; free space or name another cache folder") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY):
            raise UserError(f"{folder}: cannot be written ({error.strerror}); name another cache folder") from error
        raise
    return open_data(folder, tokenizer)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that dies."""
    import fcntl

    while True:
        with file.open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                if os.stat(file).st_ino != os.fstat(stream.fileno()).st_ino:
                    continue
            except FileNotFoundError:  # the process before this one removed the file it had locked
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return


def _write(
    source: Source,
    tokenizer: Tokenizer,
    partial: Path,
    progress: Progress | None,
    settings: Settings,
    workers: int | None,
) -> None:
    """Fill the partial folder, from its journal where there is one, and close it with the manifest."""
    state = _resume(partial, [source.name, source.fingerprint, tokenizer.hash, asdict(settings)])
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    writers = {split: SplitWriter(partial, split, dtype, state["splits"][split]) for split in ("train", "validation")}
    holding_out = "validation" not in source.splits
    duplicates = Duplicates(settings.dedup, *state["duplicates"])
    source.bad.count, source.bad.examples = state["bad_rows"][0], list(state["bad_rows"][1])
    try:
        for split in source.splits:
            if split in state["finished"]:
                continue
            pieces = source.pieces(split)
            if not tokenizer.cut_safe or duplicates.mode != "none":
                pieces = _whole(pieces)
            if duplicates.mode != "none":
                pieces = drop_duplicates(pieces, duplicates)
            # Which pieces went into the shards is a count: a piece is read again, but not tokenised again.
            number = sum(1 for piece in itertools.islice(pieces, state["pieces"]) if piece.ends)
            batches = encode_batches(tokenizer, _batches(pieces), dtype, workers)
            for n_batch, batch in enumerate(batches, 1):
                for piece, ids in zip(batch.pieces, batch.ids, strict=True):
                    target = "validation" if holding_out and _held_out(number) else split
                    writers[target].append(ids)
                    if piece.ends:
                        writers[target].end_document(tokenizer.eos_id)
                        number += 1
                state["text_bytes"] += batch.text_bytes
                state["pieces"] += len(batch.pieces)
                if n_batch % JOURNAL_EVERY == 0:
                    _journal(partial, state, writers)
                if progress is not None:
                    progress(state["text_bytes"], source.size_bytes, sum(w.tokens for w in writers.values()))
            # What was left out is counted anew whenever a split is read again, and kept once it is finished.
            state |= {"pieces": 0, "finished": [*state["finished"], split]}
            state |= {"duplicates": [duplicates.exact, duplicates.near]}
            state |= {"bad_rows": [source.bad.count, source.bad.examples]}
            _journal(partial, state, writers)
    finally:
        for writer in writers.values():
            writer.close()
    total = sum(w.tokens for w in writers.values())
    if total < MIN_TOKENS or not writers["train"].tokens:
        raise UserError(f"data source {source.name!r}: {total} tokens; expected at least {MIN_TOKENS}; name a longer text")
    if holding_out:
        top_up_validation(partial, writers, dtype, tokenizer.eos_id)
    manifest = {
        "format": FORMAT,
        "source": source.name,
        "fingerprint": source.fingerprint,
        "settings": asdict(settings),
        "tokenizer": {k: getattr(tokenizer, k) for k in ("name", "hash", "vocab_size", "eos_id")},
        "dtype": dtype.newbyteorder("=").name,
        "text_bytes": state["text_bytes"],
        "bad_rows": {"count": source.bad.count, "examples": source.bad.examples},
        "duplicates": {"exact": duplicates.exact, "near": duplicates.near},
        "splits": {split: writer.manifest() for split, writer in writers.items()},
    }
    (partial / "journal.json").unlink(missing_ok=True)
    _write_json(partial / MANIFEST, manifest)


def _held_out(number: int) -> bool:
    """Whether document `number` is validation: one of each HELD_OUT_EVERY, none of the first (see top_up_validation)."""
    group, place = divmod(number, HELD_OUT_EVERY)
    chosen = hashlib.blake2b(group.to_bytes(8, "little"), digest_size=8).digest()
    return group > 0 and int.from_bytes(chosen, "little") % HELD_OUT_EVERY == place


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 64
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _whole(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Whole documents, for a tokenizer that may not be given parts."""
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends:
            yield Piece("".join(parts), True)
            parts = []


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
                self._sync(self._data)
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
            self._sync(stream)
        return {"tokens": self.tokens, "documents": self.documents}

    @staticmethod
    def _sync(stream: BinaryIO) -> None:
        stream.flush()
        os.fsync(stream.fileno())

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
            shards.append({"file": file.name, "tokens": count, "sha256": file_sha256(file)})
        index = {"file": self.index_file.name, "documents": self.documents, "sha256": file_sha256(self.index_file)}
        return {"tokens": self.tokens, "documents": self.documents, "shards": shards, "index": index}


def _resume(partial: Path, key: list) -> dict[str, Any]:
    """The state to go on from: the journal's, with the files cut to it, or an empty folder and a fresh state."""
    fresh = {"key": key, "pieces": 0, "text_bytes": 0, "finished": [], "duplicates": [0, 0], "bad_rows": [0, []]}
    fresh["splits"] = {split: {"tokens": 0, "documents": 0} for split in ("train", "validation")}
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = json.loads((partial / "journal.json").read_bytes())
        if state["key"] == json.loads(json.dumps(key)):
            dtype = np.dtype(state["dtype"])
            writers = [SplitWriter(partial, split, dtype, counts) for split, counts in state["splits"].items()]
            for writer in writers:
                writer.close()
            if all(writer.truncate(writer.tokens, writer.documents) for writer in writers):
                return state
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return fresh


def _journal(partial: Path, state: dict[str, Any], writers: dict[str, SplitWriter]) -> None:
    state["splits"] = {split: writer.flush() for split, writer in writers.items()}
    state["dtype"] = writers["train"].dtype.str
    _write_json(partial / "journal.json", state)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(file.name + ".new")
    with temporary.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


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

"""Documents to token shards: written once, whole or not at all, and resumed after a kill.

    pieces of text -> batches of about 256 KB -> ids (in parallel) -> FOLDER.partial/*.bin +
    journal.json -> FOLDER/

The journal is written after the data it speaks of is on disk. A run that was killed cuts the data
back to the journal and goes on from there, so its result is byte-identical to that of an
undisturbed run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from fastlm import files
from fastlm.data.source import Source, splits_of_a_run
from fastlm.data.text.dedup import Duplicates, drop_duplicates
from fastlm.data.text.documents import Piece, read_pieces, whole_documents
from fastlm.data.text.encode import encode_batches
from fastlm.data.text.manifest import (
    DEFAULTS,
    FORMAT,
    MANIFEST,
    SPLITS,
    BadRowsEntry,
    DuplicatesEntry,
    MadeBy,
    Manifest,
    Settings,
)
from fastlm.data.text.tokens import TokenData, open_data
from fastlm.data.text.writer import Counts, SplitWriter, top_up_validation
from fastlm.errors import UserError
from fastlm.schema import read_json
from fastlm.tokenizer import Tokenizer

BATCH_CHARS = 1 << 18
JOURNAL = "journal.json"
JOURNAL_EVERY = 64  # batches
MIN_TOKENS = 256  # less than this is no text to train on
HELD_OUT_EVERY = 50  # one document of each 50 is validation where the source names none: 2%

Progress = Callable[[int, int | None, int], None]


@dataclass(frozen=True)
class Task:
    """What is written, and where to."""

    source: Source
    tokenizer: Tokenizer
    settings: Settings
    folder: Path
    progress: Progress | None
    workers: int | None

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids on disk."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

    @property
    def key(self) -> str:
        """What the shards are made of: a journal with another key is of no use."""
        parts = [
            self.source.name,
            self.source.fingerprint,
            self.tokenizer.hash,
            asdict(self.settings),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass
class Journal:
    """How far the shards have come; everything it counts is on the disk.

    finished: splits that were read to their end. pieces: read of the split that comes next. Bad
    records and duplicates are counted anew whenever a split is read again, and noted here once it
    is finished.
    """

    key: str
    finished: list[str] = field(default_factory=list)
    pieces: int = 0
    text_bytes: int = 0
    bad_rows: BadRowsEntry = field(default_factory=BadRowsEntry)
    duplicates: DuplicatesEntry = field(default_factory=DuplicatesEntry)
    splits: dict[str, Counts] = field(default_factory=lambda: {split: Counts() for split in SPLITS})


def write_folder(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    progress: Progress | None = None,
    settings: Settings = DEFAULTS,
    workers: int | None = None,
) -> TokenData:
    """Tokenise a source into `folder`, unless it is already there."""
    if (folder / MANIFEST).is_file():
        return open_data(folder, tokenizer)
    partial = folder.with_name(folder.name + ".partial")
    task = Task(source, tokenizer, settings, partial, progress, workers)
    try:
        with files.disk_errors("write", folder):
            files.make_folder(folder.parent)
            with files.lock(folder.with_name(folder.name + ".lock")):
                # Another process may have written it while this one waited.
                if not (folder / MANIFEST).is_file():
                    _write(task)
                    files.move_into_place(partial, folder)
    except files.DiskError as error:
        if error.disk_is_full:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except UserError:
        # A mended file is another source; a hub is read on from here.
        if source.size_bytes is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_data(folder, tokenizer)


def _write(task: Task) -> None:
    """Fill the task's folder, from its journal on where there is one; the manifest comes last."""
    splits = splits_of_a_run(task.source)
    journal = _resume(task)
    duplicates = Duplicates(task.settings.dedup, journal.duplicates.exact, journal.duplicates.near)
    task.source.bad.count = journal.bad_rows.count
    task.source.bad.examples = list(journal.bad_rows.examples)
    writers = {
        split: SplitWriter(task.folder, split, task.dtype, journal.splits[split])
        for split in SPLITS
    }
    try:
        for split in splits:
            if split not in journal.finished:
                _write_split(task, split, journal, writers, duplicates)
    finally:
        for writer in writers.values():
            writer.close()
    n_tokens = sum(writer.tokens for writer in writers.values())
    if n_tokens < MIN_TOKENS or not writers["train"].tokens:
        name = task.source.name
        raise UserError(
            f"data source {name!r}: {n_tokens} tokens; expected at least {MIN_TOKENS}; "
            "name a longer text"
        )
    if "validation" not in splits:
        top_up_validation(task.folder, writers, task.dtype, task.tokenizer.eos_id)
    made = task.tokenizer
    manifest = Manifest(
        format=FORMAT,
        source=task.source.name,
        fingerprint=task.source.fingerprint,
        settings=task.settings,
        tokenizer=MadeBy(made.name, made.hash, made.vocab_size, made.eos_id),
        dtype="uint16" if task.dtype.itemsize == 2 else "uint32",
        text_bytes=journal.text_bytes,
        bad_rows=journal.bad_rows,
        duplicates=journal.duplicates,
        splits={split: writer.entry() for split, writer in writers.items()},
    )
    (task.folder / JOURNAL).unlink(missing_ok=True)
    files.write_json(task.folder / MANIFEST, asdict(manifest))


def _write_split(
    task: Task,
    split: str,
    journal: Journal,
    writers: dict[str, SplitWriter],
    duplicates: Duplicates,
) -> None:
    """Read one split to its end; of "train" some is held out if there is no validation split."""
    holding_out = split == "train" and "validation" not in task.source.splits
    pieces = read_pieces(task.source, split)
    if not task.tokenizer.cut_safe or duplicates.mode != "none":
        pieces = whole_documents(pieces)
    if duplicates.mode != "none":
        pieces = drop_duplicates(pieces, duplicates)
    # What is in the shards already is read again, but not tokenised again.
    document = sum(1 for piece in itertools.islice(pieces, journal.pieces) if piece.ends)
    batches = encode_batches(task.tokenizer, _batches(pieces), task.dtype, task.workers)
    for number, batch in enumerate(batches, 1):
        for piece, ids in zip(batch.pieces, batch.ids, strict=True):
            writer = writers["validation" if holding_out and is_held_out(document) else split]
            writer.append(ids)
            if piece.ends:
                writer.end_document(task.tokenizer.eos_id)
                document += 1
        journal.text_bytes += batch.text_bytes
        journal.pieces += len(batch.pieces)
        if number % JOURNAL_EVERY == 0:
            _save(task, journal, writers)
        if task.progress is not None:
            n_tokens = sum(writer.tokens for writer in writers.values())
            task.progress(journal.text_bytes, task.source.size_bytes, n_tokens)
    journal.pieces = 0
    journal.finished.append(split)
    journal.duplicates = DuplicatesEntry(duplicates.exact, duplicates.near)
    journal.bad_rows = BadRowsEntry(task.source.bad.count, list(task.source.bad.examples))
    _save(task, journal, writers)


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """The pieces in lists of about BATCH_CHARS characters."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 64
        if size >= BATCH_CHARS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def is_held_out(document: int) -> bool:
    """Whether a document is validation: one of each HELD_OUT_EVERY, none of the first ones."""
    group, place = divmod(document, HELD_OUT_EVERY)
    chosen = hashlib.blake2b(group.to_bytes(8, "little"), digest_size=8).digest()
    return group > 0 and int.from_bytes(chosen, "little") % HELD_OUT_EVERY == place


def _resume(task: Task) -> Journal:
    """The journal to go on from, the files cut back to it; or a new one, in an empty folder."""
    journal = _saved_journal(task)
    if journal is None:
        shutil.rmtree(task.folder, ignore_errors=True)
        files.make_folder(task.folder)
        return Journal(task.key)
    files.remove_leftovers(task.folder)
    return journal


def _saved_journal(task: Task) -> Journal | None:
    """The journal of an earlier run that wrote the same, if the files hold all that it counts."""
    try:
        journal = read_json(task.folder / JOURNAL, Journal, "")
    except UserError:  # there is none, or an older version wrote it: begin anew
        return None
    if journal.key != task.key or set(journal.splits) != set(SPLITS):
        return None
    for split, counts in journal.splits.items():
        with SplitWriter(task.folder, split, task.dtype, counts) as writer:
            if not writer.truncate(counts):
                return None
    return journal


def _save(task: Task, journal: Journal, writers: dict[str, SplitWriter]) -> None:
    journal.splits = {split: writer.flush() for split, writer in writers.items()}
    files.write_json(task.folder / JOURNAL, asdict(journal))

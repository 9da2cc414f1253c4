"""Files and folders as data sources: which files, and which split each belongs to."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

from fastlm.data.records import BadRecords, read_records
from fastlm.data.source import VALIDATION_NAMES, Kind, Part, Source, split_named
from fastlm.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".text")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
NO_TEXT_SUFFIXES = (".bin", ".npy", ".gz", ".zip", ".zst", ".xz", ".bz2", ".csv", ".arrow")
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "text": TEXT_SUFFIXES + RECORD_SUFFIXES,
    "examples": RECORD_SUFFIXES,
}


def open_local(name: str, path: Path, kind: Kind, text_field: str, bad: BadRecords) -> Source:
    """A file, which is the training split, or every file under a folder in sorted order.

    In a folder the first part of a file's place names its split: train/, validation/ (or valid/,
    val/, dev/) and test/, or train.jsonl, validation.jsonl, test.jsonl; all else is the training
    split. Text may be in plain files and in a field of records, examples are records. Raises
    UserError where there is no such file or all of them are empty.
    """
    suffixes = SUFFIXES[kind]
    relative = {path: path.name}
    if path.is_dir():
        paths = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes and f.is_file())
        relative = {file: file.relative_to(path).as_posix() for file in paths}
        if not relative:
            raise UserError(f"data source {name!r}: the folder holds no {', '.join(suffixes)} file")
    elif path.suffix.lower() not in suffixes and not (kind == "text" and _may_be_text(path)):
        given = f"{path.suffix} files" if path.suffix else "a file without a suffix"
        raise UserError(
            f"data source {name!r}: cannot read {kind} from {given}; expected {', '.join(suffixes)}"
        )
    stats = {file: file.stat() for file in relative}
    size = sum(s.st_size for s in stats.values())
    if size == 0:
        what = "all files are" if path.is_dir() else "the file is"
        raise UserError(f"data source {name!r}: {what} empty")
    splits: dict[str, list[Part]] = {}
    identity = []
    for file, place in relative.items():
        split = _split_of(place) if path.is_dir() else "train"
        splits.setdefault(split, []).append(_part(file, kind, text_field))
        if split == "test":
            size -= stats[file].st_size
            continue
        entry = [place, stats[file].st_size, stats[file].st_mtime_ns]
        # Older versions knew validation folders and no other split: what they prepared of such
        # folders keeps its fingerprint, and so stays good.
        folder, inside, _ = place.partition("/")
        known = "validation" if inside and folder in VALIDATION_NAMES else "train"
        identity.append(entry if split == known else [*entry, split])
    fingerprint = hashlib.sha256(
        json.dumps([identity, text_field, bad.policy]).encode()
    ).hexdigest()[:16]
    return Source(str(path), fingerprint, splits, text_field, size, bad)


def _may_be_text(path: Path) -> bool:
    """Whether a file of an unknown suffix, such as .py or .tex, may be text all the same."""
    return path.suffix.lower() not in NO_TEXT_SUFFIXES


def _split_of(place: str) -> str:
    """The split of a file by its place in the folder: that of test/a.txt and test.txt is test."""
    folder, inside, _ = place.partition("/")
    return split_named(folder.lower() if inside else folder.split(".")[0].lower())


def _part(file: Path, kind: Kind, text_field: str) -> Part:
    if file.suffix.lower() not in RECORD_SUFFIXES:
        return Part(text_file=file)
    # Of a .parquet file: the others are not even read.
    columns = [text_field] if kind == "text" else None
    return Part(records=partial(read_records, file, columns=columns))

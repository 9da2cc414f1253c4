"""The manifest of a prepared folder: what its files are, how they were made, and what they must be.

A folder may come from a stranger. Nothing of a manifest is believed before its type and range are
checked, and no file that it names is opened unless it lies in the folder itself.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastlm.errors import UserError
from fastlm.schema import read_json

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
MEND = "delete the folder and prepare it again"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Settings:
    """What besides source and tokenizer decides the shards' content."""

    text_field: str = "text"
    on_bad_row: str = "fail"
    dedup: str = "none"


DEFAULTS = Settings()


@dataclass(frozen=True)
class MadeBy:
    """The tokenizer of the ids."""

    name: str
    hash: str
    vocab_size: int
    eos_id: int


@dataclass(frozen=True)
class ShardEntry:
    """One file of token ids."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class IndexEntry:
    """The file of document ends."""

    file: str
    documents: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """The files of one split, and their counts."""

    tokens: int
    documents: int
    shards: list[ShardEntry]
    index: IndexEntry


@dataclass(frozen=True)
class BadRowsEntry:
    """How many rows were left out, and some of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DuplicatesEntry:
    """How many documents were dropped because an earlier one is the same, or nearly."""

    exact: int = 0
    near: int = 0


@dataclass(frozen=True)
class Manifest:
    """Everything that manifest.json says."""

    format: Literal[1]
    source: str
    fingerprint: str
    settings: Settings
    tokenizer: MadeBy
    dtype: Literal["uint16", "uint32"]
    text_bytes: int
    bad_rows: BadRowsEntry
    duplicates: DuplicatesEntry
    splits: dict[str, SplitEntry]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder; UserError where there is none that can be believed."""
    file = folder / MANIFEST
    if not file.exists():
        raise UserError(
            f"{folder}: no {MANIFEST}; expected a folder written by `fastlm data prepare`"
        )
    manifest = read_json(file, Manifest, MEND)
    problem = _problem(manifest)
    if problem:
        raise UserError(f"{file}: {problem}; {MEND}")
    return manifest


def _problem(manifest: Manifest) -> str:
    """What does not hold between the fields, or nothing."""
    made = manifest.tokenizer
    if made.eos_id >= made.vocab_size:
        most = f"less than the vocabulary's {made.vocab_size}"
        return f"field tokenizer.eos_id: got {made.eos_id}, expected {most}"
    if set(manifest.splits) != set(SPLITS):
        got = ", ".join(sorted(ascii(name)[:40] for name in manifest.splits)[:5])
        return f"field splits: got {got or 'none'}, expected {' and '.join(SPLITS)}"
    for name, split in manifest.splits.items():
        tokens = sum(shard.tokens for shard in split.shards)
        if tokens != split.tokens:
            return (
                f"field splits.{name}.tokens: got {split.tokens:,}, expected its shards' {tokens:,}"
            )
        if split.index.documents != split.documents:
            index = f"its index's {split.index.documents:,}"
            return f"field splits.{name}.documents: got {split.documents:,}, expected {index}"
    return ""


def file_in(folder: Path, name: str) -> Path:
    """The regular file `name` inside a folder; UserError for any other, linked ones included."""
    file = folder / name
    plain = name == Path(name).name and name.isprintable() and len(name) < 256
    if not plain or name.startswith(".") or "\\" in name:
        raise UserError(
            f"{folder / MANIFEST}: names the file {ascii(name)[:60]}, expected a plain name; {MEND}"
        )
    try:
        inside = file.resolve(strict=True).parent == folder.resolve(strict=True)
        regular = stat.S_ISREG(file.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{file}: unreadable shard ({getattr(error, 'strerror', None) or error}); {MEND}"
        ) from error
    if not inside:
        raise UserError(f"{file}: a link out of its folder, expected a file inside; {MEND}")
    if not regular:
        raise UserError(f"{file}: expected a regular file; {MEND}")
    return file

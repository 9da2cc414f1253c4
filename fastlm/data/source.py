"""What a data source is: for each split, plain text files and records, always in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from fastlm.data.records import BadRecords, Record
from fastlm.errors import UserError

Kind = Literal["text", "examples"]
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


class Part(NamedTuple):
    """What a split is made of: a plain text file, or records.

    records(bad): bad ones are reported to `bad`.
    """

    text_file: Path | None = None
    records: Callable[[BadRecords], Iterator[Record]] | None = None


@dataclass(frozen=True)
class Source:
    """The data of each split, and what identifies it.

    name: as the user typed it, normalised. fingerprint: changes when the data may have changed.
    splits: the parts of "train", "validation" and "test", of those that there are. text_field: the
    field of a record that holds the text. size_bytes: of all text of train and validation, where it
    is known beforehand. bad: records left out so far.
    """

    name: str
    fingerprint: str
    splits: dict[str, list[Part]]
    text_field: str = "text"
    size_bytes: int | None = None
    bad: BadRecords = field(default_factory=lambda: BadRecords("fail"))


def split_named(name: str) -> str:
    """The split that a folder, file or hub split of this name belongs to: "train" if no other."""
    if name in VALIDATION_NAMES:
        return "validation"
    return "test" if name == "test" else "train"


def splits_of_a_run(source: Source) -> list[str]:
    """The splits that a run reads: "train", and "validation" where there is one; never "test".

    Raises UserError where there is nothing to train on.
    """
    if not source.splits.get("train"):
        splits = " and ".join(source.splits) or "nothing"
        raise UserError(
            f"data source {source.name!r}: it holds {splits}; expected data to train on beside that"
        )
    return [split for split in ("train", "validation") if split in source.splits]

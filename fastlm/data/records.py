"""Records of .json, .jsonl and .parquet files, and what becomes of bad ones.

Every bad record is reported with its file and line: either the first one ends the run, or, when the
user says so, each is left out, counted and kept as an example. Nothing is lost silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastlm import files
from fastlm.errors import UserError

MAX_LINE_BYTES = 64 << 20
EXAMPLES_KEPT = 10
PARQUET_BATCH = 1024  # records


class Record(NamedTuple):
    """Named values, and where they stand: "file:line", or whatever finds the record again."""

    place: str
    fields: dict[str, Any]


@dataclass
class BadRecords:
    """Counts bad records.

    policy "fail": `add` raises UserError. "skip": it counts, and keeps the first as examples.
    """

    policy: str = "fail"
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.policy not in ("fail", "skip"):
            raise UserError(f'bad rows: got {self.policy!r}; expected "fail" or "skip"')

    def add(self, place: str, problem: str) -> None:
        """One bad record: its place, and what is wrong with it."""
        if self.policy == "fail":
            raise UserError(
                f"{place}: {problem}; mend it, or leave bad records out with --bad-rows skip"
            )
        self.count += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{place}: {problem}")


def read_records(file: Path, bad: BadRecords, columns: list[str] | None = None) -> Iterator[Record]:
    """The records of a file, by its suffix; of .parquet only `columns` where they are given.

    Raises UserError where the file cannot be read.
    """
    suffix = file.suffix.lower()
    with files.disk_errors("read", file, "put it back, or name other data"):
        if suffix == ".parquet":
            yield from read_parquet(file, columns)
        elif suffix == ".json":
            yield from read_json(file, bad)
        else:
            yield from read_json_lines(file, bad)


def read_json_lines(file: Path, bad: BadRecords) -> Iterator[Record]:
    """One JSON object per line; blank lines are passed over.

    Bad: not UTF-8, not JSON, not an object, a key given twice, NaN or Infinity, a line over 64 MiB.
    """
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"{file}:{number}"
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):  # the rest of the line, never held whole
                    line = stream.readline(MAX_LINE_BYTES)
                bad.add(place, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            fields = parse_object(line, place, bad)
            if fields is not None:
                yield Record(place, fields)


def parse_object(line: bytes, place: str, bad: BadRecords) -> dict[str, Any] | None:
    """One JSON object from its bytes, or None after reporting what is wrong."""
    try:
        value = json.loads(
            line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        bad.add(place, f"not UTF-8 (byte {error.start} of the line: {error.reason})")
    except json.JSONDecodeError as error:
        bad.add(place, f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        bad.add(place, str(error) or "nested too deeply")
    else:
        if isinstance(value, dict):
            return value
        bad.add(place, f"expected a JSON object, got {type(value).__name__}")
    return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_json(file: Path, bad: BadRecords) -> Iterator[Record]:
    """An array of objects, or one object per line all the same; the file is read whole."""
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        for number, content in enumerate(text.split("\n"), 1):
            if content.strip():
                fields = parse_object(content.encode(), f"{file}:{number}", bad)
                if fields is not None:
                    yield Record(f"{file}:{number}", fields)
        return
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    position = start + 1
    number = 0
    line = 1
    counted = 0  # line ends before this place are in `line`
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position < len(text) and text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        number += 1
        place = f"{file}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}:{error.lineno}: not JSON ({error.msg} at column {error.colno}, "
                f"record {number}); the rest of the file cannot be read"
            ) from error
        except ValueError as error:
            bad.add(place, str(error))
            _, position = json.JSONDecoder().raw_decode(text, position)
            continue
        if isinstance(value, dict):
            yield Record(place, value)
        else:
            bad.add(place, f"expected a JSON object, got {type(value).__name__}")


def read_parquet(file: Path, columns: list[str] | None = None) -> Iterator[Record]:
    """The records of a .parquet file; only `columns` are read where the file has them."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if columns is not None and not set(columns) & set(names):
            raise UserError(
                f"{file}: no column {', '.join(map(repr, columns))}; it has {', '.join(names)}"
            )
        wanted = None if columns is None else [column for column in columns if column in names]
        for batch in table.iter_batches(batch_size=PARQUET_BATCH, columns=wanted):
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{file}:{number}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file}: not a readable parquet file ({reason}); write it again"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: record {number + 1} is not UTF-8 ({error.reason})") from error

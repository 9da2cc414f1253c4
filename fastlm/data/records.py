"""Rows of .json, .jsonl and .parquet files, and what becomes of bad ones.

Every bad row is reported with its file and line: either the first one ends the run, or, when the user says so, each is left
out, counted and kept as an example. Nothing is lost silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.errors import UserError

MAX_LINE_BYTES = 64 << 20
EXAMPLES_KEPT = 10


@dataclass
class BadRows:
    """Counts bad rows. policy "fail": `report` raises UserError; "skip": it counts, and keeps the first as examples."""

    policy: str = "fail"
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.policy not in ("fail", "skip"):
            raise UserError(f'bad rows: got {self.policy!r}; expected "fail" or "skip"')

    def report(self, place: str, problem: str) -> None:
        """One bad row: its file and line, and what is wrong with it."""
        if self.policy == "fail":
            raise UserError(f"{place}: {problem}; mend the row, or leave bad rows out with --bad-rows skip")
        self.count += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{place}: {problem}")


def read_json_rows(file: Path, bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .jsonl file (one object per line) or a .json file (an array of objects), each with "file:line".

    Bad: not UTF-8, not JSON, not an object, a key given twice, NaN or Infinity, a line over 64 MiB. Blank lines are not rows.
    """
    if file.suffix.lower() == ".json":
        yield from _read_json_array(file, bad)
        return
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"{file}:{number}"
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):  # the rest of the line, never held whole
                    line = stream.readline(MAX_LINE_BYTES)
                bad.report(place, f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            row = parse_row(line, place, bad)
            if row is not None:
                yield place, row


def parse_row(line: bytes, place: str, bad: BadRows) -> dict[str, Any] | None:
    """One JSON object from its bytes, or None after reporting what is wrong."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        bad.report(place, f"not UTF-8 (byte {error.start} of the line: {error.reason})")
    except json.JSONDecodeError as error:
        bad.report(place, f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        bad.report(place, str(error) or "nested too deeply")
    else:
        if isinstance(row, dict):
            return row
        bad.report(place, f"expected a JSON object, got {type(row).__name__}")
    return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read_json_array(file: Path, bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """A .json file is read whole: an array of objects, or one object per line under the wrong suffix."""
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        for number, content in enumerate(text.split("\n"), 1):
            if content.strip():
                row = parse_row(content.encode(), f"{file}:{number}", bad)
                if row is not None:
                    yield f"{file}:{number}", row
        return
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    at, number, line, counted = start + 1, 0, 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at < len(text) and text[at] == "]":
            return
        line += text.count("\n", counted, at)
        counted = at
        number += 1
        place = f"{file}:{line}"
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{error.lineno}: not JSON ({error.msg} at column {error.colno}, row {number}); "
                            f"the rest of the file cannot be read") from error  # fmt: skip
        except ValueError as error:
            bad.report(place, str(error))
            row, at = json.JSONDecoder().raw_decode(text, at)
            continue
        if isinstance(row, dict):
            yield place, row
        else:
            bad.report(place, f"expected a JSON object, got {type(row).__name__}")


def read_parquet_rows(file: Path, bad: BadRows, columns: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .parquet file in batches of 1,024, each with "file:row"; only `columns` are read where the file has them."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if columns is not None and not set(columns) & set(names):
            raise UserError(f"{file}: no column {', '.join(map(repr, columns))}; it has {', '.join(names)}")
        wanted = None if columns is None else [c for c in columns if c in names]
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not a readable parquet file ({reason}); write it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: row {number + 1} is not UTF-8 ({error.reason})") from error

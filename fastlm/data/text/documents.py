"""The documents of a source of text, as a stream of pieces, always in the same order.

A reader can stop after any piece and go on there another day. Nothing here holds more than one
piece (about PIECE_CHARS characters, or one record) in memory.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastlm import files
from fastlm.data.records import Record
from fastlm.data.source import Source
from fastlm.errors import UserError

PIECE_CHARS = 1 << 18
# Between the documents of a plain text file, as in TinyStories' own files.
SEPARATOR = "<|endoftext|>"
# A document may be cut before a space that stands between two non-spaces: no token of a GPT-2 style
# BPE crosses it.
_CUT = re.compile(r"(?<=\S)(?= \S)")


class Piece(NamedTuple):
    """A part of a document; `ends` marks its last part."""

    text: str
    ends: bool


def read_pieces(source: Source, split: str) -> Iterator[Piece]:
    """The documents of a split, piece by piece; bad records go to source.bad."""
    for part in source.splits[split]:
        if part.text_file is not None:
            yield from text_pieces(part.text_file)
        elif part.records is not None:
            for record in part.records(source.bad):
                if _has_text(source, record):
                    yield Piece(record.fields[source.text_field], True)


def _has_text(source: Source, record: Record) -> bool:
    """Whether the record's field of text holds some; if not, it is reported as bad."""
    name = source.text_field
    text = record.fields.get(name)
    if isinstance(text, str) and text.strip():
        return True
    if isinstance(text, str):
        source.bad.add(record.place, f"field {name!r} is empty")
        return False
    what = f"expected text, got {type(text).__name__}" if name in record.fields else "no such field"
    fields = ", ".join(map(str, list(record.fields)[:6])) or "none"
    source.bad.add(record.place, f"field {name!r}: {what} (its fields: {fields})")
    return False


def read_documents(source: Source, split: str) -> Iterator[str]:
    """The documents of a split, each whole."""
    for piece in whole_documents(read_pieces(source, split)):
        yield piece.text


def whole_documents(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same documents in one piece each, for who may not be given parts."""
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends:
            yield Piece("".join(parts), True)
            parts = []


def text_pieces(file: Path) -> Iterator[Piece]:
    """The documents of a plain text file: all of it, or the parts between "<|endoftext|>" marks.

    A long document is given in parts of about `PIECE_CHARS`, cut where no token can cross (before a
    space between two non-spaces), so that the ids are those of the whole. Text without any such
    place for 64 pieces is cut where it stands. Raises UserError where the file is not UTF-8, naming
    the byte.
    """
    pending = ""
    with (
        files.disk_errors("read", file, "put it back, or name another text"),
        file.open("rb") as stream,
    ):
        decoded = _decode_blocks(file, iter(lambda: stream.read(PIECE_CHARS), b""))
        for block in decoded:
            pending += block
            *documents, pending = pending.split(SEPARATOR)
            for document in documents:
                yield Piece(document.strip("\n"), True)
            if documents:
                pending = pending.lstrip("\n")
            if len(pending) >= PIECE_CHARS:
                cut = _last_cut(pending)
                if cut is None and len(pending) >= 64 * PIECE_CHARS:
                    cut = len(pending) - len(SEPARATOR)  # half a separator may stand at the end
                if cut is not None:
                    yield Piece(pending[:cut], False)
                    pending = pending[cut:]
    yield Piece(pending, True)


def _decode_blocks(file: Path, blocks: Iterator[bytes]) -> Iterator[str]:
    """Decode UTF-8 whose characters may be split between blocks; every line end becomes "\\n".

    A leading byte order mark is dropped.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    start = 0
    try:
        for block in blocks:
            kept = len(decoder.getstate()[0])
            yield lines.decode(block)
            start += len(block)
        kept = len(decoder.getstate()[0])
        yield lines.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = start - kept + error.start
        raise UserError(
            f"{file}: not UTF-8 (byte {place}: {error.reason}); save it as UTF-8, for example "
            "with iconv"
        ) from error


def _last_cut(text: str) -> int | None:
    """The last place near the end where the document may be cut, or None."""
    for reach in (4096, len(text)):
        start = max(1, len(text) - reach)
        # The separator has no space inside, so no cut falls inside one.
        places = [m.start() for m in _CUT.finditer(text, start)]
        if places:
            return places[-1]
    return None

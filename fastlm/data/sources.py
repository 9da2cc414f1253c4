"""Named sources of text: the standard library of the running Python, local files, the Hugging Face hub.

A source gives the documents of each split as a stream of pieces, always in the same order, so that a reader can stop after
any piece and go on there another day. A piece is a part of one document: `ends` says whether the document ends with it.
Nothing here holds more than one piece (about `PIECE_CHARS` characters, or one row of a table) in memory.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastlm.data.records import BadRows, read_json_rows, read_parquet_rows
from fastlm.errors import UserError

PIECE_CHARS = 1 << 18
TEXT_SUFFIXES = (".txt", ".md", ".text")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
STDLIB_VERSION = 1  # of the choice of files and of the held-out ones
HELD_OUT_EVERY = 50  # one document of each 50 is validation where the source names none: 2%
SEPARATOR = "<|endoftext|>"  # separates the documents of a plain text file, as in TinyStories' own files
# A document may be cut before a space that stands between two non-spaces: no token of a GPT-2 style BPE crosses it.
_CUT = re.compile(r"(?<=\S)(?= \S)")


class Piece(NamedTuple):
    """A part of a document; `ends` marks its last part."""

    text: str
    ends: bool


@dataclass(frozen=True)
class Source:
    """Documents of each split, and what identifies them.

    name: as the user typed it, normalised. fingerprint: changes when the text may have changed. splits: those the source
    itself names ("train" always; with "validation" nothing is held out). pieces(split): the stream. size_bytes: of the
    text, where it is known beforehand. bad: rows left out so far (with on_bad_row="skip").
    """

    name: str
    fingerprint: str
    splits: tuple[str, ...]
    pieces: Callable[[str], Iterator[Piece]]
    size_bytes: int | None = None
    bad: BadRows = field(default_factory=lambda: BadRows("fail"))


def open_source(name: str, text_field: str = "text", on_bad_row: str = "fail") -> Source:
    """Find a source by name: "python-stdlib", a local path, or a hub name ("wikitext-2", "org/name", ...).

    text_field names the column that holds the text in .jsonl and .parquet rows. on_bad_row is "fail" (the first bad row
    ends the run, naming file and line) or "skip" (bad rows are left out, counted and listed).
    Raises UserError where nothing of that name exists or it holds no text.
    """
    from fastlm.data.hub import HUB_NAMES, open_hub

    if not name.strip():
        raise UserError("data source: got an empty name; expected python-stdlib, a file, a folder or a hub name")
    if name == "python-stdlib":
        return _open_stdlib()
    path = Path(name).expanduser()
    if path.exists():
        return _open_local(name, path, text_field, BadRows(on_bad_row))
    looks_local = name.startswith((".", "/", "~")) or path.suffix in TEXT_SUFFIXES + ROW_SUFFIXES or "\\" in name
    if not looks_local and (name in HUB_NAMES or re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name)):
        return open_hub(name, text_field, BadRows(on_bad_row))
    known = ", ".join(["python-stdlib", *HUB_NAMES])
    raise UserError(f"data source {name!r}: no such file or folder; expected a path, {known}, or org/name of the hub")


# ---------------------------------------------------------------------------------------------------- standard library


def _open_stdlib() -> Source:
    """The Python sources of the standard library that runs this process, without its tests: about 12 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = stdlib_files(root)
    if not paths:
        raise UserError(f"data source python-stdlib: no .py files under {root}; name a text file instead")
    stats = [(name, path.stat()) for name, path in paths.items()]
    identity = json.dumps([STDLIB_VERSION, [(name, s.st_size, s.st_mtime_ns) for name, s in stats]])

    def pieces(split: str) -> Iterator[Piece]:
        files = {name: path.read_text("utf-8", errors="replace") for name, path in paths.items()}
        held_out = stdlib_held_out(files)
        for name, text in files.items():
            if text.strip() and (name in held_out) == (split == "validation"):
                yield Piece(text, True)

    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Source("python-stdlib", fingerprint, ("train", "validation"), pieces, sum(s.st_size for _, s in stats))


def stdlib_files(root: Path) -> dict[str, Path]:
    """Relative name -> file, sorted by name; tests and installed packages are left out."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        for name in names:
            if name.endswith(".py"):
                path = Path(folder) / name
                found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


def stdlib_held_out(files: dict[str, str], one_in: int = 24, max_shared: float = 0.2) -> set[str]:
    """Names of the validation files: one in `one_in` by a hash of the relative path, near-duplicates of others excepted.

    A file stays in training when more than `max_shared` of its text (lines of 12 characters and more) also stands in some
    other file, as in encodings/cp*.py, so that validation text is text the model has not seen.
    """
    candidates = [name for name in files if int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_in == 0]
    seen_in: dict[str, int] = {}
    for text in files.values():
        for line in set(_long_lines(text)):
            seen_in[line] = seen_in.get(line, 0) + 1
    held_out = set()
    for name in candidates:
        lines = _long_lines(files[name])
        shared = sum(len(line) for line in lines if seen_in[line] > 1)
        if shared <= max_shared * sum(len(line) for line in lines):
            held_out.add(name)
    return held_out


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= 12]


# --------------------------------------------------------------------------------------------------------- local files


def _open_local(name: str, path: Path, text_field: str, bad: BadRows) -> Source:
    """A file, or every text file under a folder in sorted order; files under train/ and validation/ keep their split."""
    suffixes = TEXT_SUFFIXES + ROW_SUFFIXES
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes and f.is_file())
        if not files:
            raise UserError(f"data source {name!r}: the folder holds no {', '.join(suffixes)} file")
    else:
        files = [path]
        if path.suffix.lower() in (".bin", ".npy", ".gz", ".zip", ".zst", ".xz", ".bz2", ".csv", ".arrow"):
            raise UserError(f"data source {name!r}: cannot read {path.suffix} files; expected {', '.join(suffixes)}")
    stats = {f: f.stat() for f in files}
    size = sum(s.st_size for s in stats.values())
    if size == 0:
        raise UserError(f"data source {name!r}: {'all files are' if path.is_dir() else 'the file is'} empty")
    relative = {f: f.relative_to(path).as_posix() if path.is_dir() else f.name for f in files}
    by_split: dict[str, list[Path]] = {}
    for f in files:
        folder = relative[f].split("/")[0] if "/" in relative[f] else ""
        split = "validation" if folder in ("validation", "valid", "val", "dev") else "train"
        by_split.setdefault(split, []).append(f)
    if "train" not in by_split:
        raise UserError(f"data source {name!r}: only validation files; expected training files beside them")
    identity = [(relative[f], s.st_size, s.st_mtime_ns) for f, s in stats.items()]
    fingerprint = hashlib.sha256(json.dumps([identity, text_field, bad.policy]).encode()).hexdigest()[:16]

    def pieces(split: str) -> Iterator[Piece]:
        for file in by_split[split]:
            yield from _file_pieces(file, text_field, bad)

    splits = ("train", "validation") if "validation" in by_split else ("train",)
    return Source(str(path), fingerprint, splits, pieces, size, bad)


def _file_pieces(file: Path, text_field: str, bad: BadRows) -> Iterator[Piece]:
    suffix = file.suffix.lower()
    if suffix not in ROW_SUFFIXES:
        yield from text_pieces(file)
        return
    rows = read_parquet_rows(file, bad, [text_field]) if suffix == ".parquet" else read_json_rows(file, bad)
    for place, row in rows:
        text = row.get(text_field)
        if not isinstance(text, str):
            what = f"expected text, got {type(text).__name__}" if text_field in row else "no such field"
            bad.report(place, f"field {text_field!r}: {what} (its fields: {', '.join(map(str, list(row)[:6])) or 'none'})")
        elif not text.strip():
            bad.report(place, f"field {text_field!r} is empty")
        else:
            yield Piece(text, True)


def text_pieces(file: Path) -> Iterator[Piece]:
    """The documents of a plain text file: all of it, or the parts between "<|endoftext|>" marks.

    A long document is given in parts of about `PIECE_CHARS`, cut where no token can cross (before a space between two
    non-spaces), so that the ids are those of the whole. Text without any such place for 64 pieces is cut where it stands.
    Raises UserError where the file is not UTF-8, naming the byte.
    """
    pending = ""
    with file.open("rb") as stream:
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
                    cut = len(pending) - len(SEPARATOR)
                if cut is not None:
                    yield Piece(pending[:cut], False)
                    pending = pending[cut:]
    yield Piece(pending, True)


def _decode_blocks(file: Path, blocks: Iterator[bytes]) -> Iterator[str]:
    """Decode UTF-8 whose characters may be split between blocks, as Python's text mode does: every line end becomes "\\n".

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
        raise UserError(f"{file}: not UTF-8 (byte {place}: {error.reason}); save it as UTF-8, "
                        f"for example with iconv") from error  # fmt: skip


def _last_cut(text: str) -> int | None:
    """The last place near the end where the document may be cut, or None."""
    for reach in (4096, len(text)):
        start = max(1, len(text) - reach)
        places = [m.start() for m in _CUT.finditer(text, start)]
        # The separator mark has no inner space, so a cut never falls inside one.
        if places:
            return places[-1]
    return None

"""python-stdlib: the standard library that runs this process, without its tests: about 12 MB."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastlm.data.records import BadRecords, Record
from fastlm.data.source import Part, Source
from fastlm.errors import UserError

STDLIB_VERSION = 1  # of the choice of files and of the held-out ones


def open_stdlib(name: str, bad: BadRecords) -> Source:
    """Every file as a document; UserError where this Python has no sources."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = stdlib_files(root)
    if not paths:
        raise UserError(f"data source {name}: no .py files under {root}; name a text file instead")
    stats = [(file, path.stat()) for file, path in paths.items()]
    identity = json.dumps([STDLIB_VERSION, [(file, s.st_size, s.st_mtime_ns) for file, s in stats]])

    def records(split: str, bad: BadRecords) -> Iterator[Record]:
        texts = {file: path.read_text("utf-8", errors="replace") for file, path in paths.items()}
        held_out = stdlib_held_out(texts)
        for file, text in texts.items():
            if text.strip() and (file in held_out) == (split == "validation"):
                yield Record(file, {"text": text})

    splits = {split: [Part(records=partial(records, split))] for split in ("train", "validation")}
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Source(name, fingerprint, splits, size_bytes=sum(s.st_size for _, s in stats), bad=bad)


def stdlib_files(root: Path) -> dict[str, Path]:
    """Relative name -> file, sorted by name; tests and installed packages are left out."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        for name in names:
            if name.endswith(".py"):
                path = Path(folder) / name
                paths[path.relative_to(root).as_posix()] = path
    return dict(sorted(paths.items()))


def stdlib_held_out(files: dict[str, str], one_in: int = 24, max_shared: float = 0.2) -> set[str]:
    """Names of the validation files: one in `one_in`, but none that is much like another file.

    Which ones follows from a hash of the relative path. A file stays in training when more than
    `max_shared` of its text (lines of 12 characters and more) also stands in some other file, as in
    encodings/cp*.py, so that validation text is text the model has not seen.
    """
    candidates = [
        name for name in files if int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_in == 0
    ]
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

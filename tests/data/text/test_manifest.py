"""A prepared folder may come from a stranger: it trains, or is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastlm.data.text.manifest import MANIFEST, file_in
from fastlm.data.text.prepare import prepare
from fastlm.data.text.tokens import open_data
from fastlm.errors import UserError
from fastlm.tokenizer import load_tokenizer

DELETE = object()


@pytest.fixture(scope="module")
def prepared(small_text, small_tokenizer, tmp_path_factory) -> Path:
    return prepare(
        str(small_text), load_tokenizer(str(small_tokenizer)), tmp_path_factory.mktemp("cache")
    ).folder


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "prepared")


def edit(folder: Path, place: str, value: Any) -> None:
    """Put a value, or a function of the old one, where "a.b.0.c" says; DELETE takes it out."""
    manifest = json.loads((folder / MANIFEST).read_text())
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    inner = manifest
    for key in path:
        inner = inner[key]
    if value is DELETE:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    (folder / MANIFEST).write_text(json.dumps(manifest))


EDITS = [
    ("dtype", "object"),
    ("dtype", "O"),
    ("dtype", "uint8"),
    ("dtype", "float64"),
    ("dtype", "uint32"),
    ("dtype", ["uint16", 1]),
    ("dtype", "|V2"),
    ("format", 2),
    ("format", True),
    ("format", 1.0),
    ("source", 3),
    ("source", "\ud800"),
    ("fingerprint", None),
    ("settings", []),
    ("settings.text_field", 1),
    ("tokenizer", "gpt2"),
    ("tokenizer.hash", 0),
    ("tokenizer.vocab_size", "384"),
    ("tokenizer.vocab_size", -1),
    ("tokenizer.eos_id", 384),
    ("tokenizer.eos_id", True),
    ("tokenizer.name", "/dev/zero"),
    ("text_bytes", -1),
    ("text_bytes", 1e400),
    ("bad_rows", {"count": "many", "examples": []}),
    ("bad_rows.examples", [1]),
    ("duplicates.near", None),
    ("splits", []),
    ("splits", {}),
    ("splits.train", DELETE),
    ("splits.\x1b[31m", {}),
    ("splits.train.tokens", lambda n: n + 1),
    ("splits.train.tokens", 10**30),
    ("splits.train.documents", 0),
    ("splits.train.index", DELETE),
    ("splits.train.index.documents", 2),
    ("splits.train.shards", {}),
    ("splits.train.shards", [None]),
    ("splits.train.shards", lambda shards: [*shards, *shards]),
    ("splits.train.shards.0.tokens", "12"),
    ("splits.train.shards.0.tokens", -5),
    ("splits.train.shards.0.file", "/etc/passwd"),
    ("splits.train.shards.0.file", "../../etc/passwd"),
    ("splits.train.shards.0.file", ".."),
    ("splits.train.shards.0.file", "."),
    ("splits.train.shards.0.file", ""),
    ("splits.train.shards.0.file", "sub/train-00000.bin"),
    ("splits.train.shards.0.file", "train-00000.bin\x00"),
    ("splits.train.shards.0.file", "a" * 5000),
    ("splits.train.shards.0.file", "other.bin"),
    ("splits.train.index.file", "validation.documents.bin"),
    ("splits.train.index.file", "../train.documents.bin"),
] + [
    (key, DELETE)
    for key in (
        "dtype",
        "format",
        "source",
        "settings",
        "tokenizer",
        "text_bytes",
        "bad_rows",
        "splits",
    )
]
# Nothing that training uses: only inspect, which shows it, has to refuse.
ONLY_INSPECT = [("tokenizer.name", "/dev/zero")]


@pytest.mark.parametrize(("place", "value"), EDITS)
def test_a_manifest_with_a_false_field_is_refused_in_one_line(
    folder, small_run, mistake, place, value
):
    edit(folder, place, value)
    error = mistake(["data", "inspect", str(folder)])
    assert str(folder) in error or "tokenizer" in error
    assert len(error) < 400
    assert error.strip().isprintable()
    if (place, value) not in ONLY_INSPECT:
        mistake(["pretrain", *small_run, "--data", str(folder)])


def link_out(folder: Path) -> None:
    shard = folder / "train-00000.bin"
    outside = shard.rename(folder.parent / "outside.bin")
    shard.symlink_to(outside)


def link_to_itself(folder: Path) -> None:
    (folder / "train-00000.bin").unlink()
    (folder / "train-00000.bin").symlink_to("train-00000.bin")


def pipe(folder: Path) -> None:
    (folder / "train-00000.bin").unlink()
    os.mkfifo(folder / "train-00000.bin")


def manifest_pipe(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


def manifest_folder(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / MANIFEST).write_text(content) and None


def large(folder: Path) -> None:
    with (folder / MANIFEST).open("ab") as stream:
        stream.truncate(1 << 40)


def falling_ends(folder: Path) -> None:
    file = folder / "validation.documents.bin"
    ends = np.fromfile(file, "<i8")
    np.concatenate([ends[:-1] * 0 - 1, ends[-1:]]).tofile(file)
    edit(folder, "splits.validation.index.file", file.name)
    if len(ends) == 1:
        (ends + 1).tofile(file)


def strange_id(folder: Path) -> None:
    file = folder / "train-00000.bin"
    ids = np.fromfile(file, "<u2")
    ids[7:] = 65535
    ids.tofile(file)


def nothing_left(folder: Path) -> None:
    (folder / MANIFEST).unlink()


CONTENTS = ["", "{", "[]", "null", "NaN", "[" * 100_000, '{"format": 1' + "0" * 5000 + "}"]
DAMAGE = [
    link_out,
    link_to_itself,
    pipe,
    manifest_pipe,
    manifest_folder,
    large,
    falling_ends,
    strange_id,
    nothing_left,
    *map(text, CONTENTS),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_with_damaged_files_is_refused_in_one_line(folder, small_run, mistake, damage):
    damage(folder)
    mistake(["data", "inspect", str(folder)])
    mistake(["pretrain", *small_run, "--data", str(folder)])


def test_a_link_inside_the_folder_and_a_linked_folder_are_followed(
    folder, small_tokenizer, tmp_path
):
    shard = folder / "train-00000.bin"
    shard.rename(folder / "moved.bin")
    shard.symlink_to("moved.bin")
    (tmp_path / "link").symlink_to(folder)
    assert file_in(tmp_path / "link", shard.name).samefile(folder / "moved.bin")
    assert (
        len(open_data(tmp_path / "link", load_tokenizer(str(small_tokenizer)), verify=True).train)
        > 1000
    )


def test_a_manifest_that_widens_its_own_vocabulary_is_refused(folder, small_tokenizer):
    edit(folder, "tokenizer.vocab_size", 1 << 16)
    with pytest.raises(UserError, match="of 65536 ids"):
        open_data(folder, load_tokenizer(str(small_tokenizer)))


def test_what_the_manifest_says_cannot_act_on_a_terminal(folder, capsys):
    from fastlm.cli import main

    edit(folder, "source", "\x1b]0;title\x07\nfake line")
    edit(folder, "bad_rows", {"count": 1, "examples": ["\x1b[2J"]})
    assert main(["data", "inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "\\x1b]0;title\\x07\\nfake line" in said
    assert "\\x1b[2J" in said
    assert "\x1b" not in said


def test_a_manifest_of_a_later_version_with_more_fields_is_read(folder):
    edit(folder, "tokenizer", lambda made: made | {"later": [1, {}]})
    assert open_data(folder).manifest.tokenizer.vocab_size == 384

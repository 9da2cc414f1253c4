"""Whole or not at all, whenever the process ends; each error of the disk is one line."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastlm import files
from fastlm.errors import UserError

Step = Callable[[], None]
CALLS = ("replace", "rename", "fsync", "open", "mkdir", "unlink", "rmdir")


def ended_at_call(number: int, action: Callable[[], None]) -> bool:
    """Run the action in a process that dies before its system call number `number`; if it did."""
    child = os.fork()
    if child == 0:
        left = number

        def dying(original: Callable) -> Callable:
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                return original(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def deaths(action: Step, prepare: Step, check: Step) -> int:
    """Let the action die at each of its system calls, each from the prepared state; how many."""
    for number in range(1000):
        prepare()
        died = ended_at_call(number, action)
        check()
        if not died:
            return number
    raise AssertionError("the action does not end")


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_file_is_the_old_or_the_new_at_every_moment(tmp_path):
    file = tmp_path / "a.json"
    seen = set()

    def check():
        assert visible(tmp_path) == ["a.json"]
        seen.add(json.loads(file.read_text())["value"])

    n_calls = deaths(
        lambda: files.write_json(file, {"value": 2}),
        lambda: files.write_json(file, {"value": 1}),
        check,
    )
    assert n_calls >= 3
    assert seen == {1, 2}
    files.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def write_folder(folder: Path, value: str) -> None:
    with files.whole_folder(folder) as beside:
        (beside / "a").write_text(value)
        (beside / "sub").mkdir()
        (beside / "sub" / "b").write_text(value)


def test_a_new_folder_is_whole_or_absent_at_every_moment(tmp_path):
    folder = tmp_path / "deep" / "down" / "folder"
    seen = set()

    def check():
        seen.add(folder.exists())
        if folder.exists():
            assert (folder / "a").read_text() == (folder / "sub" / "b").read_text() == "new"

    def prepare():
        files.remove_folder(tmp_path / "deep")

    assert deaths(lambda: write_folder(folder, "new"), prepare, check) > 8
    assert seen == {False, True}


def test_a_folder_that_is_replaced_is_never_half_of_each(tmp_path):
    folder = tmp_path / "folder"

    def check():
        # For a moment there is none: the old one and the new one both lie beside it.
        if folder.exists():
            assert (folder / "a").read_text() == (folder / "sub" / "b").read_text()

    def write(value: str) -> Step:
        return lambda: write_folder(folder, value)

    assert deaths(write("new"), write("old"), check) > 8
    assert (folder / "a").read_text() == "new"
    files.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_is_removed_is_whole_or_gone_at_every_moment(tmp_path):
    folder = tmp_path / "folder"

    def check():
        assert not folder.exists() or (folder / "sub" / "b").read_text() == "whole"

    def remove():
        files.remove_folder(folder)

    def prepare():
        write_folder(folder, "whole")

    assert deaths(remove, prepare, check) > 3
    assert visible(tmp_path) == []


def test_content_is_on_the_disk_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    """What a power cut leaves depends on the order of fsync and rename alone."""
    order = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def note_fsync(number):
        order.append(("fsync", os.path.realpath(f"/proc/self/fd/{number}")))
        fsync(number)

    def note(original):
        def call(a, b):
            order.append(("rename", str(b)))
            original(a, b)

        return call

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note(replace))
    monkeypatch.setattr(os, "rename", note(rename))
    files.write_text(tmp_path / "a.txt", "text")
    assert [what for what, _ in order] == ["fsync", "rename", "fsync"]
    assert order[1:] == [("rename", str(tmp_path / "a.txt")), ("fsync", str(tmp_path))]
    order.clear()
    write_folder(tmp_path / "new" / "folder", "text")
    at = order.index(("rename", str(tmp_path / "new" / "folder")))
    before = [Path(place).name for what, place in order[:at] if what == "fsync"]
    assert {"a", "b", "sub", tmp_path.name} <= set(before)
    assert order[at + 1] == ("fsync", str(tmp_path / "new"))


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_and_fail(file: Path, text: str) -> None:
    with files.whole_file(file) as stream:
        stream.write(text.encode())
        full()


@pytest.mark.parametrize("place", ["write", "fsync", "rename"])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, place):
    file = tmp_path / "config.toml"
    files.write_text(file, "old")

    with monkeypatch.context() as patch:
        if place != "write":
            patch.setattr(os, {"fsync": "fsync", "rename": "replace"}[place], full)
        action = write_and_fail if place == "write" else files.write_text
        with pytest.raises(UserError, match=f"could not write {file}: the disk is full"):
            action(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]
    assert file.read_text() == "old"


@pytest.mark.parametrize("number", sorted({*files.REASONS, errno.ENXIO, errno.ELOOP, 0}))
def test_every_error_of_the_disk_is_one_line_that_names_the_place_and_a_way_out(number):
    with pytest.raises(UserError) as caught, files.disk_errors("write", Path("/x/y")):
        raise OSError(number, os.strerror(number))
    text = str(caught.value)
    assert text.startswith("could not write /x/y: ")
    assert "\n" not in text
    assert text.count("; ") == 1
    assert errno.errorcode.get(number, "") in text


def test_an_error_without_a_number_keeps_its_words():
    line = "could not read a: short read; fetch it again"
    with (
        pytest.raises(UserError, match=line),
        files.disk_errors("read", Path("a"), "fetch it again"),
    ):
        raise OSError("short read")


def test_of_writes_within_writes_the_outermost_names_the_place_and_reads_keep_theirs():
    def inner(action):
        with files.disk_errors("write", Path("outer")), files.disk_errors(action, Path("inner")):
            raise OSError(errno.EIO, "x")

    with pytest.raises(UserError, match="could not write outer: the disk reports an error"):
        inner("write")
    with pytest.raises(UserError, match="could not read inner: "):
        inner("read")


def test_a_file_in_the_way_and_a_folder_that_may_not_be_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="something else is in its place"):
        files.write_text(tmp_path / "file" / "a", "x")
    with pytest.raises(UserError, match="something else is in its place"):
        write_folder(tmp_path / "file" / "folder", "x")
    with pytest.raises(UserError, match="could not write /proc/fastlm"):
        files.write_text(Path("/proc/fastlm/a"), "x")


def write_arrays(file: Path) -> None:
    with files.whole_file(file) as stream:
        np.savez(stream, a=np.zeros(10_000))


def write_tensors(file: Path) -> None:
    with files.disk_errors("write", file):
        files.write_tensors(file, {"x": torch.zeros(10_000)})


@pytest.mark.parametrize(
    "write",
    [
        lambda file: files.write_bytes(file, bytes(10_000)),
        lambda file: files.write_json(file, [0] * 10_000),
        lambda file: files.write_array(file, np.zeros(10_000)),
        write_arrays,
        write_tensors,
    ],
)
def test_a_size_limit_is_named_and_leaves_nothing(tmp_path, write):
    """The system's own refusal, in a process that may write 1,000 bytes a file, is named."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write(tmp_path / "a")
        except UserError as error:
            os._exit(0 if "larger than is allowed" in str(error) else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == []


def test_arrays_and_tensors_come_back(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    files.write_array(tmp_path / "new" / "a.npy", array)
    assert (np.load(tmp_path / "new" / "a.npy") == array).all()
    files.write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3)}, {"format": "pt"})
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [0, 1, 2]


def test_tensors_are_as_readable_as_any_other_file(tmp_path):
    (tmp_path / "plain").touch()
    files.write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3)})
    modes = {name: (tmp_path / name).stat().st_mode for name in ("plain", "a.safetensors")}
    assert modes["plain"] == modes["a.safetensors"]


def test_leftovers_are_only_what_writers_leave(tmp_path):
    for name in (".hidden", "a.new", ".a.12-0123abcd.new.txt", "step-000001"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".a.12-0123abcd.new").mkdir()
    (tmp_path / ".b.12-0123abcd.old").write_text("x")
    files.remove_leftovers(tmp_path)
    files.remove_leftovers(tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".a.12-0123abcd.new.txt",
        ".hidden",
        "a.new",
        "step-000001",
    ]


def test_a_lock_is_held_by_one_process_and_dies_with_it(tmp_path):
    def hold():
        child = os.fork()
        if child == 0:
            with files.lock(tmp_path / "lock"):
                (tmp_path / "held").write_text("x")
                time.sleep(60)
        while not (tmp_path / "held").exists():
            time.sleep(0.005)
        return child

    child = hold()
    waiting = os.fork()
    if waiting == 0:
        with files.lock(tmp_path / "lock"):
            os._exit(0)
    time.sleep(0.1)
    assert os.waitpid(waiting, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == 0


def test_nothing_heavy_is_imported_until_it_is_needed():
    heavy = "{'numpy', 'torch', 'safetensors'}"
    code = f"import sys; from fastlm import files; assert not {heavy} & set(sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0

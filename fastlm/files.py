"""Files and folders that are there whole or not at all, and the disk's errors in one line.

What is written stands under a hidden name beside its place until all of it is on the disk; then it
is renamed into the place, and the folder that holds it is put on the disk too, so that the rename
outlives a power cut. What is removed is renamed to a hidden name first. So a reader never meets
half of anything, whenever the process ends, and a name that begins with a dot is never part of the
data. Imports nothing but the standard library until an array is written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

from fastlm.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

ANOTHER = "name another folder"
FULL = f"free some space or {ANOTHER}"
IN_THE_WAY = ("something else is in its place", f"move it away or {ANOTHER}")
FORBIDDEN = ("you may not", f"change the permissions or {ANOTHER}")
GONE = ("it, or the folder that holds it, is not there", f"put it back or {ANOTHER}")
TOO_MANY = ("too many files are open", "raise the limit (ulimit -n)")
# What went wrong, and what to do about it.
REASONS = {
    errno.ENOSPC: ("the disk is full", FULL),
    errno.EDQUOT: ("the disk quota is used up", FULL),
    errno.EFBIG: (
        "the file would be larger than is allowed",
        f"raise the limit (ulimit -f) or {ANOTHER}",
    ),
    errno.EROFS: ("the file system is read-only", ANOTHER),
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EIO: ("the disk reports an error", f"check the disk, and {ANOTHER} on another one"),
    errno.ENOENT: GONE,
    errno.ESTALE: GONE,
    errno.ENOTDIR: IN_THE_WAY,
    errno.EISDIR: IN_THE_WAY,
    errno.EEXIST: IN_THE_WAY,
    errno.ENOTEMPTY: IN_THE_WAY,
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
    errno.EMFILE: TOO_MANY,
    errno.ENFILE: TOO_MANY,
}


# ------------------------------------------------------------------------------------------- errors


class DiskError(UserError):
    """What the disk refused, where, why, and what to do about it."""

    def __init__(self, error: OSError, action: str, place: Path, mend: str) -> None:
        number = error.errno or 0
        reason, advice = REASONS.get(number, (error.strerror or str(error), ANOTHER))
        code = f" ({errno.errorcode[number]})" if number in errno.errorcode else ""
        super().__init__(f"could not {action} {place}: {reason}{code}; {mend or advice}")
        self.error = error
        self.action = action

    @property
    def disk_is_full(self) -> bool:
        """Whether removing something would help."""
        return self.error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_errors(action: str, place: Path, mend: str = "") -> Iterator[None]:
    """Turns an OSError of the block into a DiskError.

    Where one block that writes is inside another, the outermost names the place. action: "write",
    "read", "remove". mend: what to do, where the caller knows better than REASONS.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(error, action, place, mend) from error
    except DiskError as inner:
        if inner.action != action:
            raise
        raise DiskError(inner.error, action, place, mend) from inner


# ------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[BinaryIO]:
    """A binary stream whose content takes the file's place when the block ends well.

    Until then the old file stays.
    """
    hidden = _hidden_name(file, "new")
    with disk_errors("write", file):
        make_folder(file.parent)
        try:
            with hidden.open("xb") as stream:
                yield stream
                sync(stream)
            os.replace(hidden, file)
        except BaseException:
            with contextlib.suppress(OSError):
                hidden.unlink(missing_ok=True)
            raise
        sync_folder(file.parent)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends well.

    Until then what was there stays.
    """
    with disk_errors("write", folder):
        hidden = folder_beside(folder)
        try:
            yield hidden
            move_into_place(hidden, folder)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def folder_beside(folder: Path) -> Path:
    """An empty hidden folder to fill, for move_into_place()."""
    hidden = _hidden_name(folder, "new")
    with disk_errors("write", folder):
        make_folder(folder.parent)
        hidden.mkdir()
    return hidden


def move_into_place(filled: Path, folder: Path) -> None:
    """Put a filled folder on the disk and rename it; one that is there already goes after that."""
    for path in (filled, *filled.rglob("*")):
        sync_folder(path) if path.is_dir() else _sync_path(path)
    before = _hidden_name(folder, "old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, before)
    try:
        os.rename(filled, folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(before, folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def write_bytes(file: Path, content: bytes) -> None:
    """The content as a file, whole or not at all; UserError where the disk refuses."""
    with whole_file(file) as stream:
        stream.write(content)


def write_text(file: Path, text: str) -> None:
    """The text as a UTF-8 file, whole or not at all; UserError where the disk refuses."""
    write_bytes(file, text.encode())


def write_json(file: Path, value: Any) -> None:
    """Plain values as a JSON file, whole or not at all; UserError where the disk refuses."""
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_array(file: Path, array: np.ndarray) -> None:
    """A numpy array as an .npy file, whole or not at all; UserError where the disk refuses."""
    import numpy as np

    with whole_file(file) as stream:
        # To a real file numpy writes by itself and loses the number of the system's error.
        np.save(SimpleNamespace(write=stream.write), array, allow_pickle=False)


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Tensors as a safetensors file, for a folder not in its place yet; OSError as from open()."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata)
        file.chmod(mode)  # the library's file is its owner's alone, whatever the umask says
    except SafetensorError as error:
        file.unlink(missing_ok=True)
        # As the Rust library words the number of the system's error.
        number = re.search(r"\b(?:code: |os error )(\d+)", str(error))
        code = int(number[1]) if number else 0
        raise OSError(code, os.strerror(code) if code else str(error), str(file)) from error


def make_folder(folder: Path) -> None:
    """The folder and those above it, on the disk."""
    missing = []
    for place in (folder, *folder.parents):
        if place.is_dir():
            break
        missing.append(place)
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        sync_folder(place.parent)


def sync(stream: BinaryIO) -> None:
    """Put what was written to a stream on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system lets a program ask for that."""
    try:
        _sync_path(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def _sync_path(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


# ----------------------------------------------------------------------------------------- removing


def remove_folder(folder: Path) -> None:
    """Remove a folder, if there is one: for every reader at once, then from the disk."""
    hidden = _hidden_name(folder, "old")
    with disk_errors("remove", folder):
        try:
            os.rename(folder, hidden)
        except FileNotFoundError:
            return
        sync_folder(folder.parent)
        shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in a folder that no other process writes to now."""
    for place in folder.glob(".*"):
        if not _LEFTOVER.fullmatch(place.name):
            continue
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


_LEFTOVER = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.(new|old)", re.DOTALL)


def _hidden_name(place: Path, state: str) -> Path:
    """A name beside a place that no other writer takes and no reader looks for."""
    return place.with_name(f".{place.name[:60]}.{os.getpid()}-{secrets.token_hex(4)}.{state}")


# -------------------------------------------------------------------------------- digests and locks


def sha256(file: Path) -> str:
    """SHA-256 of a file, hexadecimal; OSError where it cannot be read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def lock(file: Path) -> Iterator[None]:
    """One process at a time, by a lock on a file that exists meanwhile.

    The system frees the lock of a process that dies.
    """
    import fcntl

    while True:
        with file.open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                if os.stat(file).st_ino != os.fstat(stream.fileno()).st_ino:
                    continue
            except FileNotFoundError:  # the process before this one removed the file it had locked
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return

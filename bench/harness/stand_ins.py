"""Stand-ins for rich and safetensors, on machines that have neither. For benchmarks only.

fastlm's training loop imports rich for what it prints and safetensors for its checkpoints. A rented
GPU has torch, triton, numpy, pytest and pytest-benchmark, and no network. There these modules are put
in the place of a package that is missing: text is printed plainly, progress bars are not drawn, and
checkpoints are written by torch.save. None of it is on the path of a step between two checkpoints.
Rows say which packages had a stand-in.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any

import torch


class Console:
    """Prints plainly, as rich does into a file."""

    is_terminal = False

    def __init__(self, stderr: bool = False, quiet: bool = False, width: int = 0):
        self.file = sys.stderr if stderr else sys.stdout
        self.quiet = quiet

    def print(self, *words: object, end: str = "\n", **style: object) -> None:
        if not self.quiet:
            print(*words, end=end, file=self.file)


class Progress:
    """Draws nothing."""

    def __init__(self, *columns: object, **options: object):
        pass

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add_task(self, *words: object, **options: object) -> int:
        return 0

    def update(self, task: int, **options: object) -> None:
        pass

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


COLUMNS = (
    "BarColumn",
    "DownloadColumn",
    "TextColumn",
    "TimeRemainingColumn",
    "TransferSpeedColumn",
)


class Nothing:
    """A column of a progress bar, or a table."""

    def __init__(self, *words: object, **options: object):
        pass


class SafetensorError(Exception):
    pass


def track(items: Iterable, *words: object, **options: object) -> Iterable:
    return items


def save_file(tensors: dict[str, torch.Tensor], path: Any, metadata: Any = None) -> None:
    torch.save(tensors, path)


def load_file(path: Any) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:  # of the path's ending torch.load would make a call of safetensors
        return torch.load(file, map_location="cpu", weights_only=True)


def safe_open(*path: object, **options: object) -> None:
    raise SafetensorError("safetensors is not installed; torch.save wrote this benchmark's files")


MODULES: dict[str, dict[str, dict[str, Any]]] = {
    "rich": {
        "rich": {},
        "rich.console": {"Console": Console},
        "rich.progress": {name: Nothing for name in COLUMNS} | {"Progress": Progress, "track": track},
        "rich.table": {"Table": Nothing},
    },
    "safetensors": {
        "safetensors": {"SafetensorError": SafetensorError, "safe_open": safe_open},
        "safetensors.torch": {"save_file": save_file, "load_file": load_file},
    },
}


@cache
def stand_in() -> tuple[str, ...]:
    """Put a stand-in where a package is missing; the names of those packages."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    for package in missing:
        for name, content in MODULES[package].items():
            module = ModuleType(name, "A stand-in of the benchmarks: bench/harness/stand_ins.py.")
            module.__dict__.update(content)
            module.__path__ = []  # type: ignore[attr-defined]  # so that its submodules are found
            sys.modules[name] = module
    return tuple(missing)

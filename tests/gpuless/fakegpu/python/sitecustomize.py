"""Read by every Python that runs on the stand-in GPU: once torch is imported, it is told of it.

torch.fakegpu_counts() is what the host has asked of the device so far, torch.fakegpu_launches() the
launches of each kernel by name. When the program ends it prints the counts to stderr.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType

library = ctypes.CDLL(None)


def counts() -> dict[str, int]:
    """What has been asked of the device so far."""
    function = library.fakegpu_count
    function.restype = ctypes.c_char_p
    value, found = ctypes.c_long(), {}
    while name := function(len(found), ctypes.byref(value)):
        found[name.decode()] = value.value
    return found


def launches() -> dict[str, int]:
    """How often the host launched each kernel, by the name that its compiler gave it."""
    function = library.fakegpu_kernel
    function.restype = ctypes.c_long
    function.argtypes = ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p
    name, value, found, at = ctypes.c_char_p(), ctypes.c_long(), {}, 0
    while (at := function(at, ctypes.byref(name), ctypes.byref(value))) >= 0:
        key = (name.value or b"").decode()
        found[key] = found.get(key, 0) + value.value
    return found


def prepare(torch: ModuleType) -> None:
    torch.fakegpu_counts = counts
    torch.fakegpu_launches = launches
    if os.environ.get("FAKEGPU_PROCESS") == str(os.getpid()):  # not in its children
        atexit.register(lambda: print("fakegpu:", counts(), file=sys.stderr))


class AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch as it would be found, and calls prepare() once it is executed."""

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_prepare(module: ModuleType) -> None:
            execute(module)
            prepare(module)

        spec.loader.exec_module = execute_and_prepare  # type: ignore[method-assign]
        return spec


if hasattr(library, "fakegpu_count"):
    sys.meta_path.insert(0, AfterTorch())

"""Bytes that the kernels ask memory for, counted by running them in Triton's interpreter.

    TRITON_INTERPRET=1 python -m fastlm.kernels.audit.traffic

prints {case: {"moved": ..., "cached": ..., "floor": ...}}. The interpreter is chosen when triton is
imported, hence the process of its own. moved: bytes loaded and stored by all launches of the case,
operands that stay in cache (the norm's weight, cos, sin) counted once; cached: the bytes asked for
of those.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastlm.kernels.audit.configurations import SEQUENCES, Case, cases
from fastlm.kernels.audit.inspect import replaced

CACHED = ("weight", "W_ptr", "cos", "sin", "positions")


class Meter:
    """Counts of the launches inside `counting`.

    Bytes streamed, bytes asked of cached operands, and those bytes counted once.
    """

    def __init__(self) -> None:
        self.operands: list[tuple[int, int, str]] = []
        self.streamed = 0
        self.cached = 0
        self.once: set[int] = set()
        self.once_size = 0

    def launch(self, arguments: dict[str, Any]) -> None:
        """Note where the operands of the launch that begins lie."""
        self.operands = []
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                start = storage.data_ptr()
                self.operands.append((start, start + storage.nbytes(), name))

    def access(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """One load or store instruction."""
        addresses = pointers[np.broadcast_to(mask, pointers.shape)]
        if not addresses.size:
            return
        first = int(addresses.flat[0])
        name = next((n for start, end, n in self.operands if start <= first < end), "")
        if name in CACHED:
            self.cached += addresses.size * size
            self.once.update((np.unique(addresses) // size * size).tolist())
            self.once_size = size
        else:
            self.streamed += addresses.size * size


@contextlib.contextmanager
def counting() -> Iterator[Meter]:
    """Count what the interpreter's kernels load and store inside."""
    from triton.runtime import interpreter

    meter = Meter()
    builder = interpreter.InterpreterBuilder
    function = interpreter.InterpretedFunction
    load = builder.create_masked_load
    store = builder.create_masked_store
    run = function.run

    def size_of(pointers: Any) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        meter.access(pointers.data, mask.data, size_of(pointers))
        return load(self, pointers, mask, *args)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        meter.access(pointers.data, mask.data, size_of(pointers))
        return store(self, pointers, value, mask, *args)

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        meter.launch({**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        return run(self, *args, **kwargs)

    with (
        replaced(builder, "create_masked_load", counted_load),
        replaced(builder, "create_masked_store", counted_store),
        replaced(function, "run", counted_run),
    ):
        yield meter


def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Inputs whose values do not matter."""
    if dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)


def rows_for(case: Case) -> int:
    """Few rows, but for the norm's partial sums to be as many a row as at full size."""
    if case.width > 50000:
        return 4
    return 576 if "rms_norm backward" in case.name else 72


def measure(case: Case) -> dict[str, float]:
    """moved, cached and floor of the case, in bytes a row."""
    rows = rows_for(case)
    with counting() as meter, np.errstate(all="ignore"):
        case.launch(make, rows)
    once = len(meter.once) * meter.once_size
    # of the batch's 32 sequences of 1024 tokens, all tokens read the same weight, and those at a
    # position its cos and sin
    share = once / rows / SEQUENCES if case.op == "rope" else once / (1024 * SEQUENCES)
    moved = meter.streamed / rows + share
    return {"moved": moved, "cached": meter.cached / rows, "floor": float(case.floor)}


def main() -> None:
    """Print the counts of our kernels, or with the argument liger those of Liger's."""
    from triton.runtime.errors import InterpreterError

    found = {}
    if sys.argv[1:] == ["liger"]:
        from fastlm.kernels.audit.against import liger_cases

        for case in liger_cases():
            # its cross-entropy uses what only the compiler knows
            with contextlib.suppress(InterpreterError):
                found[case.name] = measure(case)
    else:
        found = {case.name: measure(case) for case in cases()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

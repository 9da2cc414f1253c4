"""Bytes that the kernels ask memory for, counted by running them in Triton's interpreter.

    TRITON_INTERPRET=1 python -m fastlm.kernels.traffic       prints {case: {"moved": ..., "cached": ..., "floor": ...}}

The interpreter is chosen when triton is imported, hence the process of its own. moved: bytes loaded and stored by all
launches of the case, operands that stay in cache (the norm's weight, cos, sin) counted once; cached: the bytes asked for
of those.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from fastlm.kernels.configurations import SEQUENCES, Case, cases

CACHED = ("weight", "W_ptr", "cos", "sin", "positions")


class Meter:
    """Counts of the launches inside `counting`: bytes streamed, bytes asked of cached operands and those bytes counted once."""

    def __init__(self) -> None:
        self.operands: list[tuple[int, int, str]] = []
        self.streamed = 0
        self.cached = 0
        self.once: set[int] = set()
        self.once_size = 0

    def launch(self, names: list[str], values: tuple) -> None:
        """Note where the operands of the launch that begins lie."""
        tensors = [(n, v) for n, v in zip(names, values, strict=False) if isinstance(v, torch.Tensor)]
        self.operands = []
        for name, t in tensors:
            storage = t.untyped_storage()
            self.operands.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), name))

    def access(self, pointers, mask, size: int) -> None:
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

    meter, builder = Meter(), interpreter.InterpreterBuilder
    load, store, run = builder.create_masked_load, builder.create_masked_store, interpreter.InterpretedFunction.run

    def counted_load(self, pointers, mask, *rest):
        meter.access(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        meter.access(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest)

    def counted_run(self, *args, **kwargs):
        meter.launch([*self.arg_names[: len(args)], *kwargs], (*args, *kwargs.values()))
        return run(self, *args, **kwargs)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(interpreter.InterpretedFunction, "run", counted_run),
    ):
        yield meter


def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Inputs whose values do not matter."""
    return torch.ones(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def rows_for(case: Case) -> int:
    """Enough rows for the norm's partial sums to be as many a row as at full size; few where a row is long."""
    return 4 if case.width > 50000 else 576 if "rms_norm backward" in case.name else 72


def measure(case: Case) -> dict[str, float]:
    """moved, cached and floor of the case, in bytes a row."""
    rows = rows_for(case)
    with counting() as meter, np.errstate(all="ignore"):
        case.launch(make, rows)
    once = len(meter.once) * meter.once_size
    # counted once for the tables' 32 sequences of 1024: the weight for all tokens, a position's cos and sin for 32 of them
    share = once / rows / SEQUENCES if case.op == "rope" else once / (1024 * SEQUENCES)
    return {"moved": meter.streamed / rows + share, "cached": meter.cached / rows, "floor": float(case.floor)}


def main() -> None:
    """Print the counts of our kernels, or with the argument liger of those of Liger's that the interpreter can run."""
    from triton.runtime.errors import InterpreterError

    found = {}
    if sys.argv[1:] == ["liger"]:
        from fastlm.kernels.against import liger_cases

        for case in liger_cases():
            with contextlib.suppress(InterpreterError):  # its cross-entropy uses what only the compiler knows
                found[case.name] = measure(case)
    else:
        found = {case.name: measure(case) for case in cases()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

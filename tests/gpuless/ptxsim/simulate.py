"""Launches on the CPU: of one kernel, or of all that a piece of code makes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from ptxsim.compiling import compile_kernel
from ptxsim.machine import WARP, Machine
from ptxsim.memory import GlobalMemory
from ptxsim.program import parse
from ptxsim.stats import Stats

MAX_LANES = 1 << 16  # that run side by side
Grid = int | tuple[int, ...]


def simulate(
    function: Any, grid: Grid, *args: Any, target: int = 90, num_warps: int = 4,
    num_stages: int = 3, assume_aligned: Collection[str] = (), **kwargs: Any,
) -> Stats:  # fmt: skip
    """Compile a kernel for a GPU and run its PTX over the grid on these CPU tensors, in place.

    function: from @triton.jit, not an interpreted one (TRITON_INTERPRET must be unset). args,
    kwargs: as in function[grid](*args, **kwargs). target: the compute capability, 90 is sm_90.
    assume_aligned: arguments that are marked as aligned to 16 bytes whatever they are.
    Raises SimulationError for an access out of bounds or misaligned, a race, a deadlock, or an
    opcode that is not modelled.
    """
    names = [parameter.name for parameter in function.params]
    defaults = {parameter.name: parameter.default for parameter in function.params}
    arguments = defaults | dict(zip(names, args, strict=False)) | kwargs
    kernel, types = compile_kernel(
        function, arguments, target, num_warps, num_stages, assume_aligned
    )
    values = [(name, arguments[name], kind) for name, kind in types.items()]
    threads = kernel.metadata.num_warps * WARP
    return run_ptx(kernel.asm["ptx"], grid, values, threads, kernel.metadata.shared)


@contextlib.contextmanager
def launches(target: int = 90) -> Iterator[list[tuple[str, Stats]]]:
    """Every launch kernel[grid](...) inside runs here, on CPU tensors, instead of on a GPU.

    Yields the list that fills with (kernel name, Stats). So a project's own launch functions are
    tested as they are, block sizes and grids included. Nothing is autotuned: there is no time.
    """
    record: list[tuple[str, Stats]] = []

    def run(
        self: JITFunction, *args: Any, grid: Grid | Callable[[dict], Grid], warmup: bool = False,
        num_warps: int = 4, num_stages: int = 3, **kwargs: Any,
    ) -> None:  # fmt: skip
        names = [parameter.name for parameter in self.params]
        given = dict(zip(names, args, strict=False))
        given |= {name: value for name, value in kwargs.items() if name in self.arg_names}
        sizes = grid(given) if callable(grid) else grid
        stats = simulate(
            self, sizes, target=target, num_warps=num_warps, num_stages=num_stages, **given
        )
        record.append((self.__name__, stats))

    with mock.patch.object(JITFunction, "run", run):
        yield record


def run_ptx(
    ptx: str, grid: Grid, arguments: list[tuple[str, Any, str]], threads: int, shared_bytes: int
) -> Stats:
    """Run a kernel's PTX. arguments: (name, value, Triton type) of each parameter, in order."""
    program = parse(ptx)
    memory = GlobalMemory()
    parameters = {name: 0 for name, _ in program.params}  # the last are Triton's scratch pointers
    for (parameter, size), (name, value, kind) in zip(program.params, arguments, strict=False):
        if isinstance(value, torch.Tensor):
            parameters[parameter] = memory.add(name, value)
        else:
            parameters[parameter] = raw_bits(value, kind, size)
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    columns, rows, layers = sizes + (1,) * (3 - len(sizes))
    stats = Stats(shared_bytes=shared_bytes, ptx=ptx)
    blocks = range(columns * rows * layers)
    at_once = max(1, MAX_LANES // threads)
    for first in range(0, len(blocks), at_once):
        batch, whole = blocks[first : first + at_once], (columns, rows, layers)
        Machine(program, parameters, memory, stats, batch, whole, threads).run()
    return stats


def raw_bits(value: float, kind: str, size: int) -> int:
    """A number as the launcher passes it."""
    if isinstance(value, float):
        if kind == "fp64":
            return int(np.float64(value).view(np.uint64))
        return int(np.float32(value).view(np.uint32))
    return int(value) & (1 << 8 * size) - 1

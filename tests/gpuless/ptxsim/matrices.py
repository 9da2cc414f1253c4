"""ldmatrix and stmatrix: 8 x 8 tiles of 16-bit values in shared memory, a warp at a time.

Lanes 8 i to 8 i + 7 hold the addresses of the rows of tile i. Lane L's register for a tile holds
row L // 4, columns 2 (L % 4) and 2 (L % 4) + 1; with .trans row and column change places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.loads import address, shared_access
from ptxsim.program import Instruction, SimulationError, parts
from ptxsim.warps import whole_warps

if TYPE_CHECKING:
    from ptxsim.machine import Machine


def load_or_store(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    is_load = instruction.kind == "ldmatrix"
    first, second = instruction.args
    registers, where = (first, second) if is_load else (second, first)
    if not whole_warps(machine, mask):
        raise SimulationError(f"matrix access by a partly inactive warp: {instruction.text}")
    lanes = np.nonzero(mask)[0]
    lane = machine.lane_in_warp[lanes]
    row_address = address(machine, where)
    for tile, name in enumerate(parts(registers)):
        value = np.zeros(machine.n, np.uint32)
        if not is_load:
            value[lanes] = machine.bits(name, 4)[lanes]
        for half in range(2):
            row, column = lane // 4, 2 * (lane % 4) + half
            if "trans" in instruction.op:
                row, column = column, row
            at = row_address[lanes - lane + 8 * tile + row] + 2 * column
            shift = np.uint32(16 * half)
            new = None if is_load else sixteen_bits(value[lanes] >> shift)
            old = shared_access(machine, instruction.text, at, 2, lanes, new, banks=False)
            if is_load:
                number = old[:, 0].astype(np.uint32) | old[:, 1].astype(np.uint32) << 8
                value[lanes] |= number << shift
        if is_load:
            machine.put(name, value, mask)


def sixteen_bits(value: np.ndarray) -> np.ndarray:
    """(lanes, 2): the two lower bytes."""
    return np.stack([value & 255, value >> 8 & 255], 1).astype(np.uint8)

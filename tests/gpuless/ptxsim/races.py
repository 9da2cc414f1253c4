"""Accesses to the same bytes that nothing orders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptxsim.program import SimulationError

NOBODY = -1
SEVERAL = -2  # readers from more than one block or warp


@dataclass(frozen=True)
class Who:
    """Block, warp of the block, and barriers passed so far, of each lane."""

    block: np.ndarray
    warp: np.ndarray
    epoch: np.ndarray

    def of_cells(self, each: int) -> Who:
        """The same for every cell that a lane touches, `each` of them."""
        parts = (self.block, self.warp, self.epoch)
        return Who(*[np.repeat(part.astype(np.int32), each) for part in parts])


class RaceCheck:
    """Who wrote and who read each cell of a memory last.

    Two warps of a block are ordered only by a barrier between them, which begins a new epoch; two
    blocks are never ordered. A write that meets another warp's or block's read or write of the same
    bytes in that sense is a race, unless it leaves them as they are (warps that hold copies of a
    value store it twice). Atomics are not entered. A cell is `unit` bytes.
    """

    def __init__(self, size: int, unit: int):
        cells = (size + unit - 1) // unit + 16
        self.unit = unit
        self.writer = Who(*[np.full(cells, NOBODY, np.int32) for _ in range(3)])
        self.reader = Who(*[np.full(cells, NOBODY, np.int32) for _ in range(3)])

    def read(self, first_byte: np.ndarray, width: int, who: Who, what: str) -> None:
        """Enter a load of `width` bytes by each lane. Raises SimulationError on a race."""
        cell, who = self.cells(first_byte, width, who)
        self.refuse(cell, self.writes_that_meet(cell, who), "a write", what, who)
        order = np.lexsort((who.warp, who.block, cell))
        cell, block, warp = cell[order], who.block[order], who.warp[order]
        first = np.ones(len(cell), bool)
        first[1:] = cell[1:] != cell[:-1]
        start = np.maximum.accumulate(np.where(first, np.arange(len(cell)), 0))
        other_block = np.bincount(start, block != block[start], len(cell))[first] > 0
        other_warp = np.bincount(start, warp != warp[start], len(cell))[first] > 0
        cell, epoch = cell[first], who.epoch[order][first]
        block = np.where(other_block, SEVERAL, block[first])
        warp = np.where(other_warp, SEVERAL, warp[first])
        before = self.reader.block[cell]
        same_block = (before == NOBODY) | (before == block)
        seen_by_another = (
            (self.reader.epoch[cell] == epoch)
            & (self.reader.warp[cell] != warp)
            & (before != NOBODY)
        )
        self.reader.block[cell] = np.where(same_block, block, SEVERAL)
        self.reader.warp[cell] = np.where(seen_by_another, SEVERAL, warp)
        self.reader.epoch[cell] = epoch

    def write(
        self, first_byte: np.ndarray, width: int, who: Who, what: str,
        old: np.ndarray, new: np.ndarray,
    ) -> None:  # fmt: skip
        """Enter a store; old, new: the bytes (lanes, width). Raises SimulationError on a race."""
        each = max(1, width // self.unit)
        cell, who = self.cells(first_byte, width, who)
        changed = (old != new).reshape(len(new), each, -1).any(2).ravel()
        self.refuse(cell, changed & self.writes_that_meet(cell, who), "a write", what, who)
        self.refuse(cell, changed & self.reads_that_meet(cell, who), "a read", what, who)
        twice = self.written_twice(cell, who, new.reshape(len(cell), -1))
        self.refuse(cell, twice, "a write by the same instruction", what, who)
        self.writer.block[cell] = who.block
        self.writer.warp[cell] = who.warp
        self.writer.epoch[cell] = who.epoch

    def cells(self, first_byte: np.ndarray, width: int, who: Who) -> tuple[np.ndarray, Who]:
        """The cells that the lanes touch, and whose each is."""
        each = max(1, width // self.unit)
        cell = (first_byte[:, None] // self.unit + np.arange(each)).ravel()
        return cell, who.of_cells(each)

    def writes_that_meet(self, cell: np.ndarray, who: Who) -> np.ndarray:
        """Where the last write is another block's, or another warp's of this epoch."""
        block = self.writer.block[cell]
        same_epoch = (self.writer.epoch[cell] == who.epoch) & (self.writer.warp[cell] != who.warp)
        return (block != NOBODY) & ((block != who.block) | same_epoch)

    def reads_that_meet(self, cell: np.ndarray, who: Who) -> np.ndarray:
        block = self.reader.block[cell]
        same_epoch = (self.reader.epoch[cell] == who.epoch) & (self.reader.warp[cell] != who.warp)
        return (block == SEVERAL) | (block >= 0) & ((block != who.block) | same_epoch)

    def written_twice(self, cell: np.ndarray, who: Who, values: np.ndarray) -> np.ndarray:
        """Where two warps or blocks of one instruction write unlike values to a cell."""
        order = np.argsort(cell, kind="stable")
        cell, block, warp, values = cell[order], who.block[order], who.warp[order], values[order]
        another = (block[1:] != block[:-1]) | (warp[1:] != warp[:-1])
        twice = np.zeros(len(cell), bool)
        twice[1:] = (cell[1:] == cell[:-1]) & another & (values[1:] != values[:-1]).any(1)
        return twice[np.argsort(order, kind="stable")]

    def refuse(self, cell: np.ndarray, bad: np.ndarray, kind: str, what: str, who: Who) -> None:
        """Raise SimulationError for the first bad cell, if there is one."""
        if not bad.any():
            return
        first = int(np.argmax(bad))
        writer = self.writer.block[cell[first]]
        other_block = writer >= 0 and writer != who.block[first]
        whose = "another block" if other_block else "another warp or block, with no barrier between"
        byte = int(cell[first]) * self.unit
        raise SimulationError(f"race: {what} at byte {byte} meets {kind} of {whose}")

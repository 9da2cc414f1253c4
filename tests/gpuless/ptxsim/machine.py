"""A batch of thread blocks that execute one program in lock step."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ptxsim.formats import UINT, decode, width
from ptxsim.instructions import execute
from ptxsim.memory import GlobalMemory
from ptxsim.program import Instruction, Program, SimulationError
from ptxsim.races import RaceCheck, Who
from ptxsim.stats import Stats

WARP = 32
MAX_STEPS = 50_000_000
INTEGER = re.compile(r"-?(0x)?[0-9a-fA-F]+U?")
SHARED_BASES = ("global_smem", "shared_base")  # shared memory begins at address 0
# What an opcode costs; every other one is "alu".
CLASSES = {
    **dict.fromkeys(("ld", "st", "cp", "ldmatrix", "stmatrix"), "memory"),
    **dict.fromkeys(("shfl", "redux"), "shuffle"),
    **dict.fromkeys(("bar", "barrier"), "barrier"),
    **dict.fromkeys(("ex2", "lg2", "rsqrt", "rcp", "tanh", "sqrt"), "mufu"),
    **dict.fromkeys(("div", "rem"), "divide"),
    "cvt": "convert",
    "bra": "branch",
    "fma": "fma",
}


class Machine:
    """The lanes of some blocks: registers are arrays with a number for each lane.

    Lanes that a branch has parted follow the lowest program counter first. parameters: the kernel's
    arguments as raw bits, by name.
    """

    def __init__(
        self, program: Program, parameters: dict[str, int], memory: GlobalMemory, stats: Stats,
        blocks: Sequence[int], grid: tuple[int, int, int], threads: int,
    ):  # fmt: skip
        self.program, self.parameters = program, parameters
        self.joins = set(program.labels.values())
        self.memory, self.stats = memory, stats
        self.threads = threads
        self.n = len(blocks) * threads
        lane = np.arange(self.n)
        self.block = lane // threads  # of the batch
        self.warp = lane // WARP
        self.lane_in_warp = lane % WARP
        self.block_number = np.asarray(blocks)  # in the grid
        self.registers: dict[str, np.ndarray] = {}
        self.special = self.special_registers(grid)
        self.shared = np.zeros((len(blocks), stats.shared_bytes), np.uint8)
        self.shared_races = RaceCheck(self.shared.size, 1)
        self.epoch = np.zeros(len(blocks), np.int64)  # barriers passed, per block

    def special_registers(self, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        thread = np.arange(self.n) % self.threads
        columns, rows, layers = grid
        varying = {
            "ctaid.x": (self.block_number % columns)[self.block],
            "ctaid.y": (self.block_number // columns % rows)[self.block],
            "ctaid.z": (self.block_number // (columns * rows))[self.block],
            "tid.x": thread,
            "laneid": self.lane_in_warp,
            "warpid": thread // WARP,
        }
        same = {
            "tid.y": 0, "tid.z": 0, "ntid.x": self.threads, "ntid.y": 1, "ntid.z": 1,
            "nctaid.x": columns, "nctaid.y": rows, "nctaid.z": layers,
            "cluster_ctarank": 0, "cluster_ctaid.x": 0,
        }  # fmt: skip
        constant = {name: np.full(self.n, value, np.uint32) for name, value in same.items()}
        return {name: value.astype(np.uint32) for name, value in varying.items()} | constant

    # ---- operands

    def bits(self, operand: str, size: int) -> np.ndarray:
        """Raw bits of an operand, as unsigned integers of `size` bytes."""
        if operand.startswith("%"):
            name = operand[1:]
            value = self.special[name] if name in self.special else self.registers.get(name)
            if value is None:  # undefined, as where the compiler packs a half that nobody reads
                return np.full(self.n, -1, np.int64).astype(UINT[size])
            return value if value.dtype == UINT[size] else value.astype(UINT[size])
        if operand.startswith(("0f", "0F")):
            return np.full(self.n, int(operand[2:], 16), np.uint32)
        if operand.startswith(("0d", "0D")):
            return np.full(self.n, int(operand[2:], 16), np.uint64)
        if INTEGER.fullmatch(operand):
            literal = int(operand.rstrip("U"), 0) & (1 << 8 * size) - 1
            return np.full(self.n, literal, np.uint64).astype(UINT[size])
        if operand in SHARED_BASES:
            return np.zeros(self.n, UINT[size])
        raise SimulationError(f"unknown operand {operand}")

    def number(self, operand: str, kind: str) -> np.ndarray:
        """An operand as numbers of a PTX type."""
        return decode(self.bits(operand, width(kind)), kind)

    def predicate(self, operand: str) -> np.ndarray:
        inverted = operand.startswith("!")
        name = operand.lstrip("!")
        if not name.startswith("%"):
            value = np.full(self.n, bool(int(name, 0)))
        elif name[1:] in self.registers:
            value = self.registers[name[1:]].astype(bool)
        else:
            raise SimulationError(f"predicate {name} is read before it is written")
        return ~value if inverted else value

    def put(self, operand: str, value: np.ndarray, mask: np.ndarray) -> None:
        """Write a register in the lanes of the mask."""
        if operand == "_":
            return
        name = operand[1:]
        value = np.broadcast_to(value, (self.n,))
        if mask.all():
            self.registers[name] = value.copy()
            return
        before = self.registers.get(name)
        if before is None:
            undefined = 0 if value.dtype == bool else -1
            before = np.full(self.n, undefined, np.int64)
        self.registers[name] = np.where(mask, value, before.astype(value.dtype, copy=False))

    def who(self, lanes: np.ndarray) -> Who:
        """Block, warp and epoch of these lanes, for a race check."""
        block = self.block[lanes]
        warp = self.warp[lanes] % (self.threads // WARP)
        return Who(self.block_number[block], warp, self.epoch[block])

    def warps(self, mask: np.ndarray) -> int:
        """How many warps have a lane in the mask."""
        return self.n // WARP if mask.all() else len(np.unique(self.warp[mask]))

    # ---- running

    def run(self) -> None:
        """Run all lanes to their end. Raises SimulationError."""
        self.counter = np.zeros(self.n, np.int64)
        self.done = np.zeros(self.n, bool)
        self.waiting = np.zeros(self.n, bool)
        self.steps = 0
        with np.errstate(all="ignore"):
            while not self.done.all():
                ready = ~self.done & ~self.waiting
                if not ready.any():
                    raise SimulationError("deadlock: lanes wait at a barrier others never reach")
                at = int(self.counter[ready].min())
                self.run_straight(at, ready & (self.counter == at))

    def run_straight(self, at: int, mask: np.ndarray) -> None:
        """Run these lanes from instruction `at` on, until their ways part or others may join."""
        while True:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise SimulationError("too many steps: an endless loop?")
            if at >= len(self.program.code):
                self.done |= mask
                return
            instruction = self.program.code[at]
            active = mask
            if instruction.guard:
                name, wanted = instruction.guard
                active = mask & (self.predicate(name) == wanted)
            kind = CLASSES.get(instruction.kind, "alu")
            self.stats.instructions[kind] += self.warps(active)
            at += 1
            if self.parts_ways(instruction, at, mask, active):
                return
            if active.any():
                self.execute(instruction, active)
            if at in self.joins:
                self.counter[mask] = at
                return

    def parts_ways(
        self, instruction: Instruction, after: int, mask: np.ndarray, active: np.ndarray
    ) -> bool:
        """Run an instruction after which lanes may stand apart; False if it is no such one."""
        if instruction.kind in ("ret", "exit"):
            self.counter[mask] = after
            self.done |= active
            return True
        if instruction.kind == "bra":
            self.counter[mask] = after
            self.counter[active] = self.program.labels[instruction.args[0]]
            return True
        if instruction.kind in ("bar", "barrier") and "warp" not in instruction.op:
            self.counter[mask] = after
            self.waiting |= active
            here = np.bincount(self.block[self.waiting | self.done], minlength=len(self.shared))
            free = here == self.threads
            self.waiting &= ~free[self.block]
            self.epoch += free
            return True
        return False

    def execute(self, instruction: Instruction, active: np.ndarray) -> None:
        try:
            execute(self, instruction, active)
        except SimulationError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise SimulationError(f"cannot run: {instruction.text} ({reason})") from error

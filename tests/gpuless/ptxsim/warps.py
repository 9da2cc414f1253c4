"""Instructions in which the lanes of a warp see each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.arithmetic import BINARY
from ptxsim.formats import encode
from ptxsim.integers import LARGER
from ptxsim.program import Instruction, SimulationError

if TYPE_CHECKING:
    from ptxsim.machine import Machine

WARP = 32


def whole_warps(machine: Machine, mask: np.ndarray) -> bool:
    """Whether every warp that takes part does so with all its lanes."""
    partly = machine.warp[~mask]
    return not np.isin(machine.warp[mask], partly).any()


def ballot(lanes: np.ndarray) -> np.ndarray:
    """For each warp the number whose bit i is lane i."""
    bits = lanes.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
    return bits.sum(1).astype(np.uint32)


def shuffle(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """shfl: the value of another lane; a lane outside of the warp gives one's own."""
    target, source, operand, *_ = instruction.args
    lane, b = machine.lane_in_warp, machine.bits(operand, 4).astype(np.int64)
    wanted = {"bfly": lane ^ b, "idx": b, "down": lane + b, "up": lane - b}[instruction.op[2]]
    inside = (wanted >= 0) & (wanted < WARP)
    itself = np.arange(machine.n)
    giver = np.where(inside, itself - lane + np.clip(wanted, 0, WARP - 1), itself)
    if not mask[giver[mask]].all():
        raise SimulationError(f"shuffle reads an inactive lane: {instruction.text}")
    names = target.split("|")
    machine.put(names[0], machine.bits(source, 4)[giver], mask)
    if len(names) > 1:
        machine.put(names[1], inside, mask)


def reduce(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """redux: one value of all lanes of the warp."""
    name, kind = instruction.op[2], instruction.type
    function = LARGER[name] if name in LARGER and kind[0] != "f" else BINARY[name]
    if not whole_warps(machine, mask):
        raise SimulationError(f"redux over a partly inactive warp: {instruction.text}")
    value = machine.number(instruction.args[1], kind).copy()
    for distance in (1, 2, 4, 8, 16):
        value = function(value, value[np.arange(machine.n) ^ distance])
    machine.put(instruction.args[0], encode(value, kind), mask)


def elect(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """elect: true in the first active lane of each warp."""
    first = np.zeros(machine.n, bool)
    _, places = np.unique(np.where(mask, machine.warp, -1), return_index=True)
    first[places] = True
    machine.put(instruction.args[0].split("|")[1], first & mask, mask)


def vote(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """vote: whether any or all active lanes agree, or which do (ballot)."""
    yes = machine.predicate(instruction.args[1]) & mask
    if "ballot" in instruction.op:
        result = ballot(yes)
    elif "any" in instruction.op:
        result = yes.reshape(-1, WARP).any(1)
    else:
        result = (yes | ~mask).reshape(-1, WARP).all(1)
    machine.put(instruction.args[0], result[machine.warp], mask)


def active_mask(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    machine.put(instruction.args[0], ballot(mask)[machine.warp], mask)

"""Which function carries out an instruction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim import arithmetic, integers, loads, matrices, registers, warps
from ptxsim.formats import FLOATS, PACKED
from ptxsim.program import Instruction

if TYPE_CHECKING:
    from ptxsim.machine import Machine

BY_KIND = {
    "ld": loads.load_or_store,
    "st": loads.load_or_store,
    "cp": loads.async_copy,
    "atom": loads.atomic,
    "red": loads.atomic,
    "ldmatrix": matrices.load_or_store,
    "stmatrix": matrices.load_or_store,
    "mov": registers.move,
    "cvta": registers.same_address,
    "selp": registers.select,
    "setp": arithmetic.compare,
    "cvt": arithmetic.convert,
    "shfl": warps.shuffle,
    "redux": warps.reduce,
    "elect": warps.elect,
    "vote": warps.vote,
    "activemask": warps.active_mask,
}
# They order memory, which is in order here, or are hints.
NOTHING = ("membar", "fence", "createpolicy", "prefetch", "griddepcontrol", "nanosleep")


def execute(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """Carry out one instruction in the lanes of the mask, branches and barriers excepted."""
    kind, op = instruction.kind, instruction.op
    if kind == "createpolicy":
        machine.put(instruction.args[0], np.zeros(machine.n, np.uint64), mask)
    if kind in NOTHING or (kind in ("bar", "barrier") and "warp" in op) or waits_for_copies(op):
        return
    if kind in BY_KIND:
        BY_KIND[kind](machine, instruction, mask)
    elif instruction.type == "pred":
        arithmetic.logic(machine, instruction, mask)
    elif instruction.type in PACKED:
        arithmetic.packed(machine, instruction, mask)
    elif instruction.type in ("bf16", "f16") and "f32" in op:
        arithmetic.mixed(machine, instruction, mask)
    elif instruction.type in FLOATS:
        arithmetic.floating(machine, instruction, mask)
    else:
        integers.integer(machine, instruction, mask)


def waits_for_copies(op: list[str]) -> bool:
    """cp.async.commit_group, wait_group, wait_all: an asynchronous copy is done at once here."""
    return op[:2] == ["cp", "async"] and op[2] in ("commit_group", "wait_group", "wait_all")

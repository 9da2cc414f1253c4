"""Moves between registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.formats import UINT, width
from ptxsim.program import Instruction, parts

if TYPE_CHECKING:
    from ptxsim.machine import Machine


def move(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """mov: a value, or a wide one to or from its pieces in braces, the lowest first."""
    target, source = instruction.args
    if instruction.type == "pred":
        machine.put(target, machine.predicate(source), mask)
        return
    size = width(instruction.type)
    if target.startswith("{"):
        names = parts(target)
        each = size // len(names)
        value = machine.bits(source, size)
        for i, name in enumerate(names):
            machine.put(name, (value >> UINT[size](8 * each * i)).astype(UINT[each]), mask)
    elif source.startswith("{"):
        names = parts(source)
        each = size // len(names)
        value = np.zeros(machine.n, UINT[size])
        for i, name in enumerate(names):
            value = value | machine.bits(name, each).astype(UINT[size]) << UINT[size](8 * each * i)
        machine.put(target, value, mask)
    else:
        machine.put(target, machine.bits(source, size), mask)


def same_address(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """cvta: all address spaces are one here."""
    target, source = instruction.args
    machine.put(target, machine.bits(source, 8), mask)


def select(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """selp: the first source where the predicate holds, else the second."""
    target, yes, no, condition = instruction.args
    size = width(instruction.type)
    value = np.where(machine.predicate(condition), machine.bits(yes, size), machine.bits(no, size))
    machine.put(target, value, mask)

"""Floating-point arithmetic, comparisons and conversions. Everything is computed in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.formats import (
    FLOATS,
    PACKED,
    SINT,
    UINT,
    decode,
    encode,
    flush,
    round_f32,
    saturate,
    width,
)  # fmt: skip
from ptxsim.program import Instruction, SimulationError

if TYPE_CHECKING:
    from ptxsim.machine import Machine

BINARY: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.fmax,
    "min": np.fmin,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
UNARY: dict[str, Callable] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "neg": np.negative,
    "abs": np.abs,
}
COMPARE: dict[str, Callable] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def floating(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """One result of one to three floats, rounded once."""
    op, kind = instruction.op, instruction.type
    exact = value_of(machine, instruction)
    if "sat" in op:
        exact = saturate(exact)
    if kind == "f32":
        exact = round_f32(exact, op)
        if "ftz" in op:
            exact = flush(exact)
    machine.put(instruction.args[0], encode(exact, kind), mask)


def value_of(machine: Machine, instruction: Instruction) -> np.ndarray:
    """The exact result of a floating-point instruction."""
    name = instruction.kind
    sources = [machine.number(operand, instruction.type) for operand in instruction.args[1:]]
    wide = [source.astype(np.float64) for source in sources]
    if name in ("fma", "mad"):
        return wide[0] * wide[1] + wide[2]
    if name == "div":
        return wide[0] / wide[1]
    if name == "copysign":  # the sign of the first, the magnitude of the second
        return np.copysign(wide[1], wide[0])
    if "ftz" in instruction.op:
        wide = [flush(source).astype(np.float64) for source in sources]
    if name in BINARY:
        if len(wide) != 2 and not (len(wide) == 3 and name in ("max", "min")):  # three: sm_100
            raise SimulationError(f"unknown form: {instruction.text}")
        result = functools.reduce(BINARY[name], wide)
        return (
            np.where(np.isnan(wide).any(0), np.nan, result) if "NaN" in instruction.op else result
        )
    if name in UNARY:
        return UNARY[name](wide[0])
    raise SimulationError(f"unknown opcode: {instruction.text}")


def mixed(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """sm_100: the last source and the result are f32, the other sources 16 bits wide."""
    target, *narrow, last = instruction.args
    sources = [machine.number(operand, instruction.type).astype(np.float64) for operand in narrow]
    added = machine.number(last, "f32")
    if instruction.kind == "fma":
        result = sources[0] * sources[1] + added
    else:
        result = BINARY[instruction.kind](sources[0], added)
    machine.put(target, encode(result, "f32"), mask)


def packed(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """Two numbers in one register, computed side by side."""
    kind, each = PACKED[instruction.type]
    name, size = instruction.kind, 2 * each
    shift = UINT[size](8 * each)

    def halves(operand: str) -> tuple[np.ndarray, np.ndarray]:
        bits = machine.bits(operand, size)
        low = (bits & UINT[size]((1 << 8 * each) - 1)).astype(UINT[each])
        return decode(low, kind), decode((bits >> shift).astype(UINT[each]), kind)

    results = []
    for sources in zip(*[halves(operand) for operand in instruction.args[1:]], strict=True):
        if name == "fma":
            result = sources[0].astype(np.float64) * sources[1] + sources[2]
        else:
            result = UNARY[name](sources[0]) if name in UNARY else BINARY[name](*sources)
        results.append(encode(result, kind).astype(UINT[size]))
    machine.put(instruction.args[0], results[0] | results[1] << shift, mask)


def logic(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """and, or, xor, not of predicates."""
    first = machine.predicate(instruction.args[1])
    if instruction.kind == "not":
        result = ~first
    else:
        result = BINARY[instruction.kind](first, machine.predicate(instruction.args[2]))
    machine.put(instruction.args[0], result, mask)


def compare(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """setp: a comparison, perhaps combined with a predicate; p|q also gives its opposite."""
    op, args, kind = instruction.op, instruction.args, instruction.type
    name = op[1]
    first, second = machine.number(args[1], kind), machine.number(args[2], kind)
    unordered = np.isnan(first) | np.isnan(second)
    if name in ("nan", "num"):
        result = unordered if name == "nan" else ~unordered
    elif name in COMPARE:
        result = COMPARE[name](first, second) & ~unordered
    else:  # ltu, neu, ...: or unordered
        result = COMPARE[name[:-1]](first, second) | unordered
    if len(op) > 3 and op[2] in ("and", "or", "xor"):
        result = BINARY[op[2]](result, machine.predicate(args[3]))
    targets = args[0].split("|")
    machine.put(targets[0], result, mask)
    if len(targets) > 1:
        machine.put(targets[1], ~result, mask)


def convert(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """cvt: between number formats; of two floats to one packed register, the first the higher."""
    op, args = instruction.op, instruction.args
    target, source = op[-2], op[-1]
    if target in ("bf16x2", "f16x2"):
        kind = target[:-2]
        high, low = (encode(machine.number(a, "f32"), kind).astype(np.uint32) for a in args[1:3])
        machine.put(args[0], low | high << 16, mask)
        return
    value = machine.number(args[1], source)
    if target in FLOATS:
        value = to_float(value, target, op)
    elif source in FLOATS:
        value = to_integer(value, target, op)
    else:
        value = value.astype(SINT[8] if source[0] == "s" else UINT[8])
    machine.put(args[0], encode(value, target), mask)


def to_float(value: np.ndarray, target: str, op: list[str]) -> np.ndarray:
    if target == "f64":
        return value
    if "sat" in op:
        value = saturate(value)
    if target == "f32":
        value = round_f32(value, op)
    return flush(value) if "ftz" in op else value


def to_integer(value: np.ndarray, target: str, op: list[str]) -> np.ndarray:
    """Rounded as .rzi, .rmi, .rpi or (the default) .rni says, and clamped to the type's range."""
    rounding = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    name = next((name for name in rounding if name in op), "")
    whole = rounding.get(name, np.rint)(value).astype(np.float64)
    size = width(target)
    limits = np.iinfo(SINT[size] if target[0] == "s" else UINT[size])
    whole = np.clip(np.nan_to_num(whole), float(limits.min), float(limits.max))
    if size == 8:
        return whole
    return np.where(whole >= float(limits.max), limits.max, whole.astype(np.int64))

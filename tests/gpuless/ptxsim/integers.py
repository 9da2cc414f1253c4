"""Integer arithmetic and bit operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.formats import UINT, encode, width
from ptxsim.program import Instruction, SimulationError

if TYPE_CHECKING:
    from ptxsim.machine import Machine

WRAPPING: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
LARGER: dict[str, Callable] = {"max": np.maximum, "min": np.minimum}
# operands of each opcode, the result among them; all others have three
OPERANDS = {"mad": 4, "bfe": 4, "prmt": 4, "lop3": 5} | dict.fromkeys(
    ("not", "neg", "abs", "popc", "clz", "brev"), 2
)


def integer(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """One integer result, wrapped to its width."""
    op, name, kind = instruction.op, instruction.kind, instruction.type
    if len(instruction.args) != OPERANDS.get(name, 3):
        raise SimulationError(f"unknown form: {instruction.text}")
    target, *sources = instruction.args
    size = width(kind)
    if name in ("mul", "mad") and ("wide" in op or "hi" in op):
        result = product(machine, sources, kind, op)
    elif name == "mad":
        first, second, added = (machine.bits(source, size) for source in sources)
        result = first * second + added
    elif name in WRAPPING:
        result = WRAPPING[name](*[machine.bits(source, size) for source in sources])
    elif name in LARGER:
        result = encode(LARGER[name](*[machine.number(source, kind) for source in sources]), kind)
    elif name in ("shl", "shr"):
        result = shifted(machine, sources, name, kind)
    elif name in ("div", "rem"):
        result = divided(machine, sources, name, kind)
    elif name == "not":
        result = ~machine.bits(sources[0], size)
    elif name == "neg":
        result = encode(-machine.number(sources[0], kind), kind)
    elif name == "abs":
        result = encode(np.abs(machine.number(sources[0], kind)), kind)
    elif name == "bfe":
        result = bit_field(machine, sources, kind)
    elif name in ("popc", "clz", "brev"):
        result = counted_bits(machine.bits(sources[0], size), name, size)
    elif name == "prmt":
        result = permuted_bytes(machine, sources)
    elif name == "lop3":
        result = any_logic(machine, sources, size)
    else:
        raise SimulationError(f"unknown opcode: {instruction.text}")
    machine.put(target, result, mask)


def product(machine: Machine, sources: list[str], kind: str, op: list[str]) -> np.ndarray:
    """mul or mad .wide: twice as wide; .hi: the upper half. mad adds the third source to it."""
    size = width(kind)
    first, second = (machine.number(source, kind).tolist() for source in sources[:2])
    exact = np.array([a * b for a, b in zip(first, second, strict=True)], object)
    if "hi" in op:
        result_size, exact = size, exact >> 8 * size
    else:
        result_size = 2 * size
    result = (exact & (1 << 8 * result_size) - 1).astype(UINT[result_size])
    return result + machine.bits(sources[2], result_size) if op[0] == "mad" else result


def shifted(machine: Machine, sources: list[str], name: str, kind: str) -> np.ndarray:
    """shl, shr: by the whole width or more there is nothing left but the sign."""
    bits = 8 * width(kind)
    value = machine.number(sources[0], kind)
    by = machine.bits(sources[1], 4).astype(np.int64)
    inside = np.clip(by, 0, bits - 1).astype(value.dtype)
    result = value << inside if name == "shl" else value >> inside
    rest = value >> value.dtype.type(bits - 1) if name == "shr" and kind[0] == "s" else 0
    return encode(np.where(by >= bits, rest, result), kind)


def divided(machine: Machine, sources: list[str], name: str, kind: str) -> np.ndarray:
    """div, rem: rounded towards zero; by zero it is 0 here and undefined on a GPU."""

    def one(dividend: int, divisor: int) -> int:
        if divisor == 0:
            return 0
        quotient, remainder = divmod(abs(dividend), abs(divisor))
        if name == "rem":
            return remainder if dividend >= 0 else -remainder
        return quotient if (dividend < 0) == (divisor < 0) else -quotient

    first, second = (machine.number(source, kind).tolist() for source in sources)
    values = [one(a, b) & (1 << 64) - 1 for a, b in zip(first, second, strict=True)]
    return np.array(values, np.uint64).astype(UINT[width(kind)])


def bit_field(machine: Machine, sources: list[str], kind: str) -> np.ndarray:
    """bfe: some bits from a position on, extended with their sign where the type has one."""
    value = machine.number(sources[0], kind).astype(np.int64)
    start, length = (machine.bits(source, 4).astype(np.int64) & 255 for source in sources[1:])
    field = (value >> start) & ((1 << length) - 1)
    if kind[0] == "s":
        negative = field >> np.maximum(length - 1, 0) & 1
        field = np.where(negative, field - (1 << length), field)
    return encode(field, kind)


def counted_bits(value: np.ndarray, name: str, size: int) -> np.ndarray:
    """popc: ones; clz: zeros before the highest one; brev: the bits in reverse order."""
    unsigned = UINT[size]
    bits = (value[:, None] >> np.arange(8 * size, dtype=unsigned)) & unsigned(1)  # lowest first
    if name == "popc":
        return bits.sum(1).astype(np.uint32)
    if name == "clz":
        zeros = np.argmax(bits[:, ::-1], 1)
        return np.where(bits.any(1), zeros, 8 * size).astype(np.uint32)
    reversed_bits = bits[:, ::-1].astype(np.uint64) << np.arange(8 * size, dtype=np.uint64)
    return reversed_bits.sum(1).astype(unsigned)


def permuted_bytes(machine: Machine, sources: list[str]) -> np.ndarray:
    """prmt: each result byte is one of the eight source bytes, or its sign spread out."""
    first, second, selector = (machine.bits(source, 4) for source in sources)
    pool = np.stack([word >> 8 * i & 255 for word in (first, second) for i in range(4)])
    result = np.zeros(machine.n, np.uint32)
    for i in range(4):
        chosen = selector >> (4 * i) & 15
        byte = pool[(chosen & 7).astype(int), np.arange(machine.n)]
        sign = np.where(byte & 128, 255, 0)
        byte = np.where(chosen & 8, sign, byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def any_logic(machine: Machine, sources: list[str], size: int) -> np.ndarray:
    """lop3: the function of three bits whose truth table is the last operand."""
    first, second, third = (machine.bits(source, size) for source in sources[:3])
    truth = int(sources[3], 0)
    result = np.zeros(machine.n, UINT[size])
    for i in range(8):
        if truth >> i & 1:
            result |= (
                (first if i & 4 else ~first)
                & (second if i & 2 else ~second)
                & (third if i & 1 else ~third)
            )
    return result

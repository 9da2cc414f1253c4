"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.arithmetic import BINARY
from ptxsim.formats import UINT, decode, encode, width
from ptxsim.memory import Region
from ptxsim.program import Instruction, SimulationError, parts
from ptxsim.stats import SECTOR, no_traffic

if TYPE_CHECKING:
    from ptxsim.machine import Machine

ADDRESS = re.compile(r"\[\s*(%?[\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
SPACES = ("param", "global", "shared", "local")
BANKS, BANK_BYTES = 32, 4
ATOMICS = ("add", "max", "min", "and", "or", "exch")


def address(machine: Machine, operand: str) -> np.ndarray:
    """The address [register + offset] in each lane."""
    name, offset = named_address(operand)
    if name.startswith("%"):
        return machine.bits(name, 8).astype(np.int64) + offset
    if name == "global_smem":
        return np.full(machine.n, offset, np.int64)
    raise SimulationError(f"unknown address {operand}")


def named_address(operand: str) -> tuple[str, int]:
    match = ADDRESS.fullmatch(operand)
    if match is None:
        raise SimulationError(f"unknown address {operand}")
    return match[1], int(match[2], 0) if match[2] else 0


def load_or_store(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """ld, st: a number or a vector of them."""
    spaces = [part.split("::")[0] for part in instruction.op]
    space = next((space for space in SPACES if space in spaces), "global")
    is_load = instruction.kind == "ld"
    first, second, *_ = instruction.args  # a third one is a cache policy
    registers, where = (first, second) if is_load else (second, first)
    if space == "param":
        load_parameter(machine, instruction, mask)
        return
    if space == "local":
        raise SimulationError(f"local memory is not modelled: {instruction.text}")
    each = width(instruction.type)
    names = parts(registers)
    lanes = np.nonzero(mask)[0]
    at = address(machine, where)[lanes]
    new = None if is_load else stored_bytes(machine, names, each, lanes)
    access = global_access if space == "global" else shared_access
    old = access(machine, instruction.text, at, each * len(names), lanes, new)
    if is_load:
        put_bytes(machine, names, each, lanes, old, mask)


def load_parameter(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    name, offset = named_address(instruction.args[1])
    size = width(instruction.type)
    value = machine.parameters[name] >> 8 * offset & (1 << 8 * size) - 1
    filled = np.full(machine.n, value, np.uint64).astype(UINT[size])
    machine.put(instruction.args[0], filled, mask)


def stored_bytes(machine: Machine, names: list[str], each: int, lanes: np.ndarray) -> np.ndarray:
    """(lanes, bytes): what the registers hold, one after the other."""
    values = [np.ascontiguousarray(machine.bits(name, each)[lanes]) for name in names]
    return np.concatenate([value.view(np.uint8).reshape(-1, each) for value in values], 1)


def put_bytes(
    machine: Machine, names: list[str], each: int, lanes: np.ndarray, data: np.ndarray,
    mask: np.ndarray,
) -> None:  # fmt: skip
    """Write what was loaded, (lanes, bytes), into the registers."""
    for k, name in enumerate(names):
        part = np.ascontiguousarray(data[:, k * each : (k + 1) * each])
        value = np.zeros(machine.n, UINT[each])
        value[lanes] = part.view(UINT[each])[:, 0]
        machine.put(name, value, mask)


def global_access(
    machine: Machine, text: str, at: np.ndarray, size: int, lanes: np.ndarray,
    new: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """The bytes (lanes, size) there before; new ones are stored."""
    region = machine.memory.locate(at, size, text)
    start = at - region.start
    index = start[:, None] + np.arange(size)
    count(machine, region, at, lanes, size, new is None)
    old = region.data[index]
    what = f"{text} ({region.name})"
    if new is None:
        region.races.read(start, size, machine.who(lanes), what)
    else:
        region.races.write(start, size, machine.who(lanes), what, old, new)
        region.data[index] = new
    return old


def shared_access(
    machine: Machine, text: str, at: np.ndarray, size: int, lanes: np.ndarray,
    new: np.ndarray | None, banks: bool = True,
) -> np.ndarray:  # fmt: skip
    """The same in shared memory. banks: count the conflicts."""
    room = machine.shared.shape[1]
    if (at < 0).any() or (at + size > room).any():
        raise SimulationError(f"shared memory out of bounds ({room} bytes): {text}")
    if (at % size).any():
        raise SimulationError(f"misaligned shared access: {text}")
    if banks:
        machine.stats.bank_conflicts += conflicts(machine, at, lanes, size)
    block = machine.block[lanes]
    index = (block[:, None], at[:, None] + np.arange(size))
    old = machine.shared[index]
    first_byte, what = at + block * room, f"{text} (shared)"
    if new is None:
        machine.shared_races.read(first_byte, size, machine.who(lanes), what)
    else:
        machine.shared_races.write(first_byte, size, machine.who(lanes), what, old, new)
        machine.shared[index] = new
    return old


def count(
    machine: Machine, region: Region, at: np.ndarray, lanes: np.ndarray, size: int, is_load: bool
) -> None:
    """Enter an access in the tensor's traffic: a warp's request moves each sector it meets once."""
    tensors = machine.stats.tensors
    if region.name not in tensors:
        tensors[region.name] = no_traffic(len(region.data))
    traffic = tensors[region.name]
    sector = at // SECTOR - region.start // SECTOR
    warp = machine.warp[lanes].astype(np.int64)
    moved = len(np.unique(warp * (len(traffic.touched_load) + 1) + sector))
    requests = len(np.unique(warp))
    if is_load:
        traffic.load_requests += requests
        traffic.load_bytes += len(lanes) * size
        traffic.load_sectors += moved
        traffic.touched_load[sector] = True
    else:
        traffic.store_requests += requests
        traffic.store_bytes += len(lanes) * size
        traffic.store_sectors += moved
        traffic.touched_store[sector] = True


def conflicts(machine: Machine, at: np.ndarray, lanes: np.ndarray, size: int) -> int:
    """Extra passes over the banks: a warp's 8- and 16-byte accesses are made in 2 and 4 groups."""
    lanes_at_once = min(32, 128 // max(size, BANK_BYTES))
    group = machine.warp[lanes].astype(np.int64) * 32 + machine.lane_in_warp[lanes] // lanes_at_once
    word = at // BANK_BYTES
    distinct = np.unique(np.stack([group, word % BANKS, word], 1), axis=0)
    of_bank, words = np.unique(distinct[:, :2], axis=0, return_counts=True)
    worst = np.zeros(int(group.max()) + 1, np.int64)
    np.maximum.at(worst, of_bank[:, 0], words)
    return int(np.maximum(worst - 1, 0).sum())


def atomic(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """atom and red in global memory, one lane after the other; atom gives the value before."""
    target, where, operand = (
        instruction.args[:3] if instruction.kind == "atom" else ("", *instruction.args[:2])
    )
    kind = instruction.type
    each, sources, lanes = width(kind), parts(operand), np.nonzero(mask)[0]
    size = each * len(sources)
    at = address(machine, where)[lanes]
    region = machine.memory.locate(at, size, instruction.text)
    count(machine, region, at, lanes, size, True)
    count(machine, region, at, lanes, size, False)
    machine.stats.instructions["atomic"] += len(np.unique(machine.warp[lanes]))
    how = next((name for name in ATOMICS if name in instruction.op), "")
    if not how:
        raise SimulationError(f"unknown atomic: {instruction.text}")
    before = np.zeros((len(sources), machine.n), UINT[each])
    values = [machine.number(source, kind)[lanes] for source in sources]
    for k, start in enumerate(at - region.start):
        for e, value in enumerate(values):
            cell = region.data[start + e * each : start + (e + 1) * each]
            old = np.frombuffer(cell.tobytes(), UINT[each])
            before[e, lanes[k]] = old[0]
            now = value[k] if how == "exch" else BINARY[how](decode(old, kind)[0], value[k])
            cell[:] = np.frombuffer(encode(np.array([now]), kind).tobytes(), np.uint8)
    if target:
        for name, value in zip(parts(target), before, strict=True):
            machine.put(name, value, mask)


def async_copy(machine: Machine, instruction: Instruction, mask: np.ndarray) -> None:
    """cp.async: from global to shared memory; zeros where the last operand is 0."""
    target, source, size_text, *rest = instruction.args
    size, lanes = int(size_text, 0), np.nonzero(mask)[0]
    to = address(machine, target)[lanes]
    at = address(machine, source)[lanes]
    wanted = np.full(len(lanes), size)
    if rest and not rest[0].startswith("%rd"):  # a 64-bit register there is a cache policy
        wanted = machine.bits(rest[0], 4)[lanes]
    data = np.zeros((len(lanes), size), np.uint8)
    live = wanted > 0
    if live.any():
        data[live] = global_access(machine, instruction.text, at[live], size, lanes[live], None)
    shared_access(machine, instruction.text, to, size, lanes, data, banks=False)

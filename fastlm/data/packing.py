"""Packing examples into rows: best fit decreasing, then rows in a seeded order, with the boundaries attention needs.

An example of n ids takes n - 1 slots (its last id, the end-of-text, is a target and never an input). Examples lie end to end
in a row, each with positions from 0; what is left of a row is padding, a document of its own, which nothing is counted in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastlm.data.batches import IGNORED, mix64, permutation_keys, permute
from fastlm.errors import UserError


def best_fit_decreasing(sizes: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of the items of each bin: longest first, each into the fullest bin that still takes it (Johnson 1974).

    Uses at most 11/9 of the fewest bins, plus one. Ties go by index and then to the oldest bin, so the result is the same
    everywhere. Raises ValueError where an item is larger than the capacity.
    """
    sizes = np.asarray(sizes, np.int64)
    if len(sizes) and (int(sizes.max()) > capacity or int(sizes.min()) < 0):
        raise ValueError(f"sizes from {sizes.min()} to {sizes.max()}, expected 0 to the capacity {capacity}")
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free slots -> bins, newest last
    free = 0  # bit r is set where with_room[r] has a bin: the fullest fitting bin is the lowest bit from the size up
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        fitting = free >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                free &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        with_room[room - size].append(chosen)
        free |= 1 << (room - size)
    return bins


@dataclass(frozen=True)
class PackedBatch:
    """One batch for the model: x, y and positions (rows, row_len) int64; y is -100 where nothing is counted.

    cu_seqlens: int32, boundaries in the rows laid end to end, from 0 to rows * row_len; the last is repeated (documents of
    no length) so that all batches of as many rows have one shape and a compiled model is not compiled again. max_seqlen:
    the longest document there may be (row_len). real: slots that hold a token of an example. unit: (rows, row_len) int64, the
    example each counted target belongs to, numbered within the batch from 0 (for pairs: 2 i is the chosen and 2 i + 1 the
    rejected answer of pair i), -1 elsewhere. units: how many there are.
    """

    x: Tensor
    y: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    real: int
    unit: Tensor
    units: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on a device."""
        names = ("x", "y", "positions", "cu_seqlens", "unit")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})

    def pin_memory(self) -> PackedBatch:
        """The same batch in pinned memory, from which a copy to a GPU does not wait."""
        names = ("x", "y", "positions", "cu_seqlens", "unit")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


@dataclass(frozen=True)
class PackedRows:
    """Examples in rows: which sequences lie in which row, in which order.

    ids, counted: all sequences end to end; ends: (n_sequences,) where each ends. group: sequences per example (1, or 2 for
    the answers of a pair, which always share a row). rows: the example numbers of each row.
    """

    ids: np.ndarray
    counted: np.ndarray
    ends: np.ndarray
    group: int
    row_len: int
    rows: list[list[int]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def real_share(self) -> float:
        """Share of the slots that hold a token of an example."""
        return self.real_slots / (len(self.rows) * self.row_len)

    @property
    def real_slots(self) -> int:
        """Slots that hold a token of an example."""
        return int(self.ends[-1]) - len(self.ends)

    @cached_property
    def most_documents(self) -> int:
        """Documents a row may have: its sequences and its padding."""
        return self.group * max(map(len, self.rows)) + 1

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and counted flags of one sequence."""
        start, end = int(self.ends[number - 1]) if number else 0, int(self.ends[number])
        return self.ids[start:end], self.counted[start:end]


def pack(sequences: Sequence[tuple[np.ndarray, np.ndarray]], row_len: int, group: int = 1) -> PackedRows:
    """Pack (ids, counted) sequences into rows of row_len slots; each `group` of consecutive ones shares a row.

    Raises UserError where there is nothing to pack or a group does not fit a row.
    """
    if not sequences:
        raise UserError("no example is left to train on; see what was dropped, or give more data")
    slots = np.array([len(ids) - 1 for ids, _ in sequences], np.int64).reshape(-1, group).sum(1)
    if int(slots.max()) > row_len:
        raise UserError(f"an example takes {int(slots.max())} tokens, a row has {row_len}; lengthen the row or truncate more")
    ids = np.concatenate([ids for ids, _ in sequences]).astype(np.int32)
    counted = np.concatenate([counted for _, counted in sequences])
    ends = np.cumsum([len(ids) for ids, _ in sequences])
    return PackedRows(ids, counted, ends, group, row_len, best_fit_decreasing(slots, row_len))


def packed_batch(packed: PackedRows, position: int, count: int, seed: int) -> PackedBatch:
    """Rows position ... position + count - 1 of the run, each epoch in a seeded order of its own.

    position counts the rows drawn so far over all ranks and micro-batches, as in `row_batch`.
    """
    chosen = []
    for number in range(position, position + count):
        epoch, place = divmod(number, len(packed))
        chosen.append(packed.rows[permute(place, len(packed), permutation_keys(mix64(seed, 7), epoch))])
    return lay_out(packed, chosen)


def packed_epoch(packed: PackedRows, count: int):
    """Every row once, in the order packed, `count` at a time (the last batch is filled with empty rows): for validation."""
    for start in range(0, len(packed), count):
        part = packed.rows[start : start + count]
        yield lay_out(packed, part + [[]] * (count - len(part)))


def lay_out(packed: PackedRows, rows: list[list[int]]) -> PackedBatch:
    """The batch that holds these examples, row by row."""
    length, group = packed.row_len, packed.group
    x, positions = np.zeros((2, len(rows), length), np.int64)
    y = np.full((len(rows), length), IGNORED, np.int64)
    unit = np.full((len(rows), length), -1, np.int64)
    bounds, real, units = [0], 0, 0
    for row, examples in enumerate(rows):
        at = 0
        for sequence in (example * group + n for example in examples for n in range(group)):
            ids, counted = packed.sequence(sequence)
            stop = at + len(ids) - 1
            x[row, at:stop] = ids[:-1]
            y[row, at:stop] = np.where(counted[1:], ids[1:], IGNORED)
            unit[row, at:stop] = np.where(counted[1:], units, -1)
            positions[row, at:stop] = np.arange(stop - at)
            bounds.append(row * length + stop)
            units += 1
            at = stop
        real += at
        if at < length:
            positions[row, at:] = np.arange(length - at)
            bounds.append((row + 1) * length)
    bounds += bounds[-1:] * (len(rows) * packed.most_documents + 1 - len(bounds))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    x_, y_, positions_, unit_ = map(torch.from_numpy, (x, y, positions, unit))
    return PackedBatch(x_, y_, positions_, cu_seqlens, length, real, unit_, units)

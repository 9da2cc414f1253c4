"""Packing examples into rows: best fit decreasing, then rows in a seeded order.

An example of n ids takes n - 1 slots (its last id, the end-of-text, is a target and never an
input). Examples lie end to end in a row, each with positions from 0; what is left of a row is
padding, a document of its own, at position 0, which nothing is counted in.

The answers of a preference pair may share their prompt: the row then holds three segments, the
prompt but its last id once, then each answer, which starts at the prompt's last id, with positions
that go on from the shared part. An answer sees the shared part and itself, never the other answer,
and has the same logits as on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlm.data import IGNORED
from fastlm.data.order import mix64, permutation_keys, permute
from fastlm.errors import UserError


def best_fit_decreasing(sizes: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of the items of each bin.

    Longest first, each into the fullest bin that still takes it (Johnson 1974). Uses at most 11/9
    of the fewest bins, plus one. Ties go by index and then to the oldest bin, so the result is the
    same everywhere. Raises ValueError where an item is larger than the capacity.
    """
    sizes = np.asarray(sizes, np.int64)
    if len(sizes) and (int(sizes.max()) > capacity or int(sizes.min()) < 0):
        raise ValueError(
            f"sizes from {sizes.min()} to {sizes.max()}, expected 0 to the capacity {capacity}"
        )
    bins: list[list[int]] = []
    # Free slots -> bins, newest last.
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set where with_room[r] has a bin: the fullest that fits is the lowest bit from the
    # size up.
    free = 0
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        fitting = free >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                free &= ~(1 << room)
        else:
            room = capacity
            chosen = len(bins)
            bins.append([])
        bins[chosen].append(index)
        with_room[room - size].append(chosen)
        free |= 1 << (room - size)
    return bins


class PackedBatch(NamedTuple):
    """One batch for the model.

    x, y, positions: (rows, row_len) int64; y is -100 where nothing is counted. unit: (rows,
    row_len) int64, the example each counted target belongs to, numbered within the batch from 0
    (for pairs: 2 i is the chosen and 2 i + 1 the rejected answer of pair i), -1 elsewhere; units:
    how many there are. numbers: (rows,) int64, which packed row each is (-1 for an empty one).
    cu_seqlens: int32, boundaries of the segments in the rows laid end to end, from 0 to rows *
    row_len; max_seqlen: the longest segment there may be (row_len).

    sharing: None, or where prompts are shared, cu_seqlens_k, int32, keys (n,) int64 and places
    (rows * row_len, 1 + group) int64. Segment i sees the slots keys[cu_seqlens_k[i] :
    cu_seqlens_k[i + 1]], of which its own are the last; slot m stands at keys[places[m]], of which
    the last, n - 1, is seen by none and stands for nowhere.

    Boundaries repeat their last and keys end in 0, so that all batches of as many rows have one
    shape and a compiled model is not compiled again. real: slots that hold a token of an example;
    counted: targets.
    """

    x: Tensor
    y: Tensor
    positions: Tensor
    unit: Tensor
    numbers: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    sharing: tuple[Tensor, Tensor, Tensor] | None
    real: int
    counted: int
    units: int

    def layout(self) -> dict[str, Any]:
        """What the model needs beside the tokens."""
        names = ("positions", "cu_seqlens", "max_seqlen", "sharing")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class PackedRows:
    """Examples in rows: which sequences lie in which row, in which order.

    ids, counted: all sequences end to end; ends: (n_sequences,) where each ends. group: sequences
    per example (1, or 2 for the answers of a pair, which always share a row). shared: (n_examples,)
    slots that an example's sequences share. rows: the example numbers of each row.
    """

    ids: np.ndarray
    counted: np.ndarray
    ends: np.ndarray
    group: int
    shared: np.ndarray
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
        return int(self.ends[-1]) - len(self.ends) - (self.group - 1) * int(self.shared.sum())

    @cached_property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each row, the segments that it may have and the slots that these see.

        Segments: its sequences, what they share, and its padding. A slot that several see is
        counted for each.
        """
        each = self.group + bool(self.shared.any())
        segments = np.array([each * len(row) + 1 for row in self.rows])
        keys = np.array([self.row_len + self.group * self.shared[row].sum() for row in self.rows])
        return segments, keys

    def room(self, count: int) -> tuple[int, int]:
        """The most segments that a batch of `count` rows may have, and keys, one unseen."""
        segments, keys = self.sizes
        return most_of(segments, count), most_of(keys, count) + 1

    @cached_property
    def most_counted(self) -> int:
        """Targets that a row may have."""
        before = np.concatenate([[0], np.cumsum(self.counted)])
        starts = np.concatenate([[0], self.ends[:-1]])
        each = (before[self.ends] - before[starts + 1]).reshape(-1, self.group).sum(1)
        return max(int(each[row].sum()) for row in self.rows)

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and counted flags of one sequence."""
        start = int(self.ends[number - 1]) if number else 0
        end = int(self.ends[number])
        return self.ids[start:end], self.counted[start:end]


def most_of(sizes: np.ndarray, count: int) -> int:
    """The most that `count` consecutive rows of a run add up to, whatever their order.

    A batch meets no row twice, unless it reaches into another epoch.
    """
    times = 2 + count // len(sizes)
    return int(np.sort(np.repeat(sizes, min(times, count)))[-count:].sum())


def pack(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]],
    row_len: int,
    group: int = 1,
    share: bool = False,
) -> PackedRows:
    """Pack (ids, counted) sequences into rows of row_len slots.

    group: so many consecutive sequences share a row. share: the sequences of a group hold what they
    have in common before their first counted targets once. Raises UserError where there is nothing
    to pack or a group does not fit a row.
    """
    if not sequences:
        raise UserError("no example is left to train on; see what was dropped, or give more data")
    groups = [sequences[i : i + group] for i in range(0, len(sequences), group)]
    shared = np.array([common_slots(g) if share else 0 for g in groups], np.int64)
    slots = np.array([sum(len(ids) - 1 for ids, _ in g) for g in groups]) - (group - 1) * shared
    if int(slots.max()) > row_len:
        raise UserError(
            f"an example takes {int(slots.max())} tokens, a row has {row_len}; "
            "lengthen the row or truncate more"
        )
    ids = np.concatenate([ids for ids, _ in sequences]).astype(np.int32)
    counted = np.concatenate([counted for _, counted in sequences])
    ends = np.cumsum([len(ids) for ids, _ in sequences])
    return PackedRows(
        ids, counted, ends, group, shared, row_len, best_fit_decreasing(slots, row_len)
    )


def common_slots(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
    """How many slots from the start hold the same ids in all sequences and predict no target."""
    first = sequences[0][0]
    most = min(int(np.append(counted[1:], True).argmax()) for _, counted in sequences)
    for ids, _ in sequences[1:]:
        n = min(len(first), len(ids), most)
        most = int(np.append(first[:n] != ids[:n], True).argmax())
    return most


def packed_batch(
    packed: PackedRows, position: int, count: int, seed: int, room: tuple[int, int] | None = None
) -> PackedBatch:
    """Rows position ... position + count - 1 of the run, each epoch in a seeded order of its own.

    position counts the rows drawn so far over all ranks and micro-batches, as in `row_batch`.
    """
    chosen = []
    for number in range(position, position + count):
        epoch, place = divmod(number, len(packed))
        chosen.append(permute(place, len(packed), permutation_keys(mix64(seed, 7), epoch)))
    return lay_out(packed, chosen, room)


def packed_epoch(
    packed: PackedRows, count: int, room: tuple[int, int] | None = None
) -> Iterator[PackedBatch]:
    """Every row once, in the order packed, `count` at a time: for validation.

    The last batch is filled with empty rows.
    """
    for start in range(0, len(packed), count):
        stop = min(start + count, len(packed))
        yield lay_out(packed, [*range(start, stop), *[-1] * (start + count - stop)], room)


def lay_out(
    packed: PackedRows, numbers: Sequence[int], room: tuple[int, int] | None = None
) -> PackedBatch:
    """The batch that holds these packed rows (-1: an empty one).

    room: segments and keys that its tensors have room for (None: packed.room()).
    """
    most_segments, most_keys = room or packed.room(len(numbers))
    length = packed.row_len
    group = packed.group
    x, positions = np.zeros((2, len(numbers), length), np.int64)
    y = np.full((len(numbers), length), IGNORED, np.int64)
    unit = np.full((len(numbers), length), -1, np.int64)
    bounds = [0]
    key_bounds = [0]
    real = 0
    units = 0
    keys: list[int] = []
    places = np.full((len(numbers) * length, 1 + group), most_keys - 1, np.int64)

    def segment(row: int, at: int, size: int, seen: range, side: int = 0) -> int:
        """Close a segment of the row that starts at slot `at`. Returns its end.

        seen: the slots that it sees beside its own. side: which of the segments that see them it
        is, from 1 on.
        """
        start = row * length + at
        bounds.append(start + size)
        places[seen.start : seen.stop, side] = np.arange(len(keys), len(keys) + len(seen))
        keys.extend([*seen, *range(start, start + size)])
        places[start : start + size, 0] = np.arange(len(keys) - size, len(keys))
        key_bounds.append(len(keys))
        return at + size

    for row, number in enumerate(numbers):
        at = 0
        for example in packed.rows[number] if number >= 0 else []:
            shared = int(packed.shared[example])
            seen = range(row * length + at, row * length + at + shared)
            if shared:
                x[row, at : at + shared] = packed.sequence(example * group)[0][:shared]
                positions[row, at : at + shared] = np.arange(shared)
                at = segment(row, at, shared, range(0))
            for side, sequence in enumerate(range(example * group, (example + 1) * group), 1):
                ids, counted = (part[shared:] for part in packed.sequence(sequence))
                here = slice(at, at + len(ids) - 1)
                x[row, here] = ids[:-1]
                y[row, here] = np.where(counted[1:], ids[1:], IGNORED)
                unit[row, here] = np.where(counted[1:], units, -1)
                positions[row, here] = np.arange(shared, shared + len(ids) - 1)
                at = segment(row, at, len(ids) - 1, seen, side)
                units += 1
        real += at
        if at < length:
            segment(row, at, length - at, range(0))
    sharing = None
    if packed.shared.any():
        keys += [0] * (most_keys - len(keys))
        sharing = (
            boundaries(key_bounds, most_segments),
            torch.tensor(keys),
            torch.from_numpy(places),
        )
    return PackedBatch(
        x=torch.from_numpy(x),
        y=torch.from_numpy(y),
        positions=torch.from_numpy(positions),
        unit=torch.from_numpy(unit),
        numbers=torch.tensor(numbers),
        cu_seqlens=boundaries(bounds, most_segments),
        max_seqlen=length,
        sharing=sharing,
        real=real,
        counted=int((y != IGNORED).sum()),
        units=units,
    )


def boundaries(bounds: list[int], segments: int) -> Tensor:
    """The boundaries of so many segments, int32: those beyond the last have no length."""
    return torch.tensor(bounds + bounds[-1:] * (segments + 1 - len(bounds)), dtype=torch.int32)

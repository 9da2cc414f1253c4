"""Global memory: the tensors' storages at simulated addresses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ptxsim.program import SimulationError
from ptxsim.races import RaceCheck

FIRST_ADDRESS = 0x7F0000000000
GUARD = 65536  # bytes between two storages that belong to nobody
ALIGNMENT = 256  # of a storage's address, beside what its real address leaves over


@dataclass(frozen=True)
class Region:
    """A storage: its bytes (the tensor's own), from where to where, and who touched them."""

    name: str
    start: int
    data: np.ndarray
    races: RaceCheck

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class GlobalMemory:
    """The storages, each between guard zones, with their real alignment kept."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.by_storage: dict[int, Region] = {}
        self.next = FIRST_ADDRESS

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """The simulated address of the tensor's first element."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.by_storage:
            data = np.empty(0, np.uint8)
            if storage.nbytes():
                data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            unit = 1 if tensor.element_size() == 1 else 2
            start = self.next + key % ALIGNMENT
            region = Region(name, start, data, RaceCheck(len(data), unit))
            taken = len(data) + ALIGNMENT + GUARD
            self.next += -(-taken // ALIGNMENT) * ALIGNMENT
            self.by_storage[key] = region
            self.regions.append(region)
        return self.by_storage[key].start + tensor.data_ptr() - key

    def locate(self, address: np.ndarray, width: int, text: str) -> Region:
        """The one storage that all these accesses of `width` bytes fall in, aligned to it."""
        low, high = int(address.min()), int(address.max()) + width
        for region in self.regions:
            if region.start <= low and high <= region.end:
                break
        else:
            raise SimulationError(f"out of bounds: {text} ({self.nearest(low, high)})")
        if width > 1 and (address % width).any():
            raise SimulationError(f"misaligned {width}-byte access to {region.name}: {text}")
        return region

    def nearest(self, low: int, high: int) -> str:
        """Words for where an access out of bounds went."""
        if not self.regions:
            return "no tensors"
        near = min(self.regions, key=lambda r: min(abs(low - r.start), abs(high - r.end)))
        offsets = f"{low - near.start}..{high - near.start}"
        return f"nearest {near.name}: offsets {offsets} of {len(near.data)} bytes"

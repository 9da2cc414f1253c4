"""What a launch moved and executed, and the lower bounds on its time that follow from that."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32  # bytes: the smallest piece that moves between DRAM and the caches
COLUMNS = (
    f"{'tensor':<16}{'size':>12}{'load B':>12}{'load sect*32':>14}"
    f"{'store B':>12}{'store sect*32':>14}{'passes':>8}{'B/request':>10}"
)


@dataclass
class Traffic:
    """What one tensor cost, in bytes unless the name says otherwise.

    A request is one warp's instruction. touched_load, touched_store: which sectors were met.
    """

    size: int
    touched_load: np.ndarray
    touched_store: np.ndarray
    load_requests: int = 0
    store_requests: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    load_sectors: int = 0
    store_sectors: int = 0

    def row(self, name: str) -> str:
        requests = self.load_requests + self.store_requests
        asked = self.load_bytes + self.store_bytes
        return (
            f"{name:<16}{self.size:>12}{self.load_bytes:>12}{SECTOR * self.load_sectors:>14}"
            f"{self.store_bytes:>12}{SECTOR * self.store_sectors:>14}"
            f"{asked / max(self.size, 1):>8.2f}{asked / max(requests, 1):>10.1f}"
        )


def no_traffic(size: int) -> Traffic:
    """A tensor of so many bytes that nobody has met; its first sector may be a partial one."""
    sectors = (size + 3 * SECTOR - 1) // SECTOR
    return Traffic(size, np.zeros(sectors, bool), np.zeros(sectors, bool))


@dataclass
class Stats:
    """Counts of one launch; tensors by the name of their argument."""

    tensors: dict[str, Traffic] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)  # of warps, by class
    bank_conflicts: int = 0
    shared_bytes: int = 0
    ptx: str = ""

    def sectors(self) -> int:
        return sum(t.load_sectors + t.store_sectors for t in self.tensors.values())

    def dram_bytes(self) -> int:
        """Least DRAM traffic: every distinct sector read once and written once."""
        loads = sum(int(t.touched_load.sum()) for t in self.tensors.values())
        stores = sum(int(t.touched_store.sum()) for t in self.tensors.values())
        return SECTOR * (loads + stores)

    def projected_us(
        self, tb_s: float = 3.0, multiprocessors: int = 132, ghz: float = 1.755
    ) -> dict[str, float]:
        """Lower bounds in microseconds, each as if it were the only limit; the defaults: an H100.

        memory: the least DRAM traffic at the rate of a copy. issue: warp instructions at 4 a clock
        and multiprocessor (PTX counts stand for those of the machine code). mufu: special functions
        and divisions at 16 lanes a clock. For comparing variants; never a measurement.
        """
        clock = multiprocessors * ghz * 1e3
        special = self.instructions["mufu"] + self.instructions["divide"]
        return {
            "memory": self.dram_bytes() / tb_s / 1e6,
            "issue": self.instructions.total() / (4 * clock),
            "mufu": special / (0.5 * clock),
        }

    def table(self) -> str:
        bounds = ", ".join(f"{name} {us:.3f}" for name, us in self.projected_us().items())
        classes = ", ".join(f"{name} {n}" for name, n in self.instructions.most_common(14))
        return "\n".join([
            COLUMNS,
            *[traffic.row(name) for name, traffic in self.tensors.items()],
            f"least DRAM bytes {self.dram_bytes()}, sector bytes {SECTOR * self.sectors()}, "
            f"bank conflicts {self.bank_conflicts}, "
            f"warp instructions {self.instructions.total()}",
            f"lower bounds, us (projection): {bounds}",
            f"by class: {classes}",
        ])  # fmt: skip

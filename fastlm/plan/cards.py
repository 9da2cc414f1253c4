"""The GPUs that a plan can be made for, by the maker's data sheets."""

from __future__ import annotations

from typing import NamedTuple

from fastlm.errors import check
from fastlm.runtime import PEAKS


class Card(NamedTuple):
    """A GPU as it is sold in machines of eight."""

    name: str  # in fastlm.runtime.PEAKS, which has its FLOP/s
    memory_gib: int  # that CUDA gives a program, rounded down
    memory_tb_s: float
    node_gb_s: float  # each way, to the GPUs of its machine: half of NVLink's figure
    network_gb_s: float  # each way, to other machines: one network card for each GPU
    watts: int  # at most
    multiprocessors: int

    @property
    def flops(self) -> float:
        """Dense bf16 matmuls, FLOP/s."""
        return PEAKS[self.name]


# Data sheets of the GPUs, and of the machines that they are sold in
CARDS = {
    "a100": Card("A100", 79, 2.039, 300, 25, 400, 108),  # NVIDIA A100 80 GB SXM, DGX A100
    "h100": Card("H100", 79, 3.35, 450, 50, 700, 132),  # NVIDIA H100 SXM, DGX H100
    "h200": Card("H200", 139, 4.8, 450, 50, 700, 132),  # NVIDIA H200 SXM, DGX H200
    "b200": Card("B200", 178, 8.0, 900, 50, 1000, 148),  # NVIDIA Blackwell, DGX B200
}


def card(name: str) -> Card:
    """The card of that name; UserError for another one, with those that are known."""
    check(name in CARDS, f"unknown GPU {name!r}; choose among {', '.join(CARDS)}")
    return CARDS[name]

"""A whole run: how long it takes, what its checkpoints cost, how often it fails, and what it draws
from the grid.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlm.plan.cards import Card
from fastlm.plan.memory import optimizer_bytes
from fastlm.plan.step import Step
from fastlm.plan.work import FULL, Way, Work, stored_parameters

DAY = 86400.0
# Interruptions that nobody planned: 419 in 54 days on 16,384 H100s
# (Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.3.4)
FAILURES_PER_GPU_DAY = 419 / (54 * 16384)
RESTART_S = 300.0  # from the failure to the next step, its checkpoint read: assumed
STALL_S = 1.0  # of a checkpoint whose writing goes on beside training, at least: assumed
HOST_BYTES_S = 20e9  # from a GPU to its machine's memory: assumed, PCIe 4.0 with 16 lanes has 32


class Run(NamedTuple):
    """A run over so many tokens."""

    step_s: float
    tokens_per_s: float
    mfu: float
    checkpoint_bytes: int
    checkpoint_s: float  # until it is written
    stall_s: float  # of it, what training waits for
    every_s: float  # between checkpoints, for the least time lost
    lost: float  # share of the time: writing, work done again, starting again
    tokens_per_day: float  # with what is lost
    seconds: float  # the same
    failures: float
    mwh: float


def checkpoint_bytes(work: Work) -> int:
    """Weights and optimizer state in fp32."""
    return FULL * stored_parameters(work.config) + optimizer_bytes(work.config, work.optimizer)


def best_interval(write_s: float, between_failures_s: float) -> float:
    """Seconds between checkpoints that lose the least: sqrt(2 write failure) (Young 1974)."""
    return (2 * write_s * between_failures_s) ** 0.5


def run(work: Work, way: Way, card: Card, one: Step, tokens: float, write_gb_s: float) -> Run:
    """The run, a step of which is `one`; every machine writes its part of a checkpoint.

    One GPU's training waits until it is written; several copy theirs to the host and go on. Lost,
    as a share: stall / interval + (interval / 2 + restart) / time between failures. Energy: every
    GPU at its data sheet's most, all the time; hosts, network and cooling come on top.
    """
    seconds = one.seconds(work.passes)
    rate = one.tokens / seconds
    size = checkpoint_bytes(work)
    write_s = size / (way.nodes * write_gb_s * 1e9)
    between = DAY / (FAILURES_PER_GPU_DAY * way.gpus)
    stall_s = write_s if way.gpus == 1 else STALL_S + size / way.gpus / HOST_BYTES_S
    every = max(best_interval(stall_s, between), write_s)
    lost = stall_s / every + (every / 2 + RESTART_S) / between
    days = tokens / (rate * DAY) * (1 + lost)
    return Run(
        step_s=seconds,
        tokens_per_s=rate,
        mfu=one.flops / seconds / (way.gpus * card.flops),
        checkpoint_bytes=size,
        checkpoint_s=write_s,
        stall_s=stall_s,
        every_s=every,
        lost=lost / (1 + lost),
        tokens_per_day=tokens / days,
        seconds=days * DAY,
        failures=days * FAILURES_PER_GPU_DAY * way.gpus,
        mwh=days * 24 * way.gpus * card.watts / 1e6,
    )

"""Contenders in processes of their own, which take turns, and ratios round by round."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def ratio(others: list[float], ours: list[float]) -> float:
    """The median over the rounds of other / ours: above 1, ours is faster."""
    return statistics.median(o / u for o, u in zip(others, ours, strict=True))


class Contender:
    """One contender of contenders.py in a process of its own, which waits between its turns.

    Small ones stay in this one.
    """

    def __init__(self, name: str, small: bool):
        self.process = None
        if small:
            from bench.peers.contenders import CONTENDERS
            from fastlm.runtime import process_peak_gib

            self.turn = CONTENDERS[name]("small")
            self.ready = {"peak_gib": process_peak_gib()}
            return
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.peers.contenders", name, "full"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        assert line, f"contender stopped with exit code {self.process.wait()}"
        return json.loads(line)

    def __call__(self) -> dict:
        """One turn: {"seconds", "peak_gib" of the process so far, ...}."""
        if self.process is None:
            start = time.perf_counter()
            self.turn()
            return {"seconds": time.perf_counter() - start, **self.ready}
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()


def rounds_of(players: dict, rounds: int, benchmark) -> dict[str, list[dict]]:
    """What each player says after each of its turns.

    The first turn of "ours" goes through pytest-benchmark.
    """
    turns: dict[str, list[dict]] = {name: [] for name in players}
    for round_number in range(rounds):
        for name, player in players.items():
            first = name == "ours" and round_number == 0
            turns[name].append(benchmark.pedantic(player) if first else player())
    return turns


def each(
    turns: dict[str, list[dict]], quantity: str, start: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """One quantity of all turns, by player, above what it was at the start."""
    start = start or {}
    return {
        name: [turn[quantity] - start.get(name, 0) for turn in of_player]
        for name, of_player in turns.items()
    }

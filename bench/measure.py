"""What benchmarks measure with: contenders in processes of their own, ratios round by round."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path


def ratio(others: list[float], ours: list[float]) -> float:
    """The median over the rounds of other / ours: above 1, ours is faster."""
    return statistics.median(o / u for o, u in zip(others, ours, strict=True))


class Contender:
    """One contender of contenders.py in a process of its own, which waits between its turns."""

    def __init__(self, name: str, small: bool):
        script = Path(__file__).with_name("contenders.py")
        command = [sys.executable, str(script), name, "small" if small else "full"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        assert line, f"contender stopped with exit code {self.process.wait()}"
        return json.loads(line)

    def __call__(self) -> dict:
        """One turn: {"seconds", "peak_gib" of the process so far, ...}."""
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self.answer()

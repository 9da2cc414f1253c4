"""What benchmarks measure with: contenders in processes of their own, ratios round by round."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def ratio(others: list[float], ours: list[float]) -> float:
    """The median over the rounds of other / ours: above 1, ours is faster."""
    return statistics.median(o / u for o, u in zip(others, ours, strict=True))


class Contender:
    """One contender of contenders.py in a process of its own, which waits between its turns; small ones stay in this one."""

    def __init__(self, name: str, small: bool):
        self.process = None
        if small:
            from contenders import CONTENDERS

            from fastlm.runtime import process_peak_gib

            self.turn = CONTENDERS[name]("small")
            self.ready = {"peak_gib": process_peak_gib()}
            return
        script = Path(__file__).with_name("contenders.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), name, "full"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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

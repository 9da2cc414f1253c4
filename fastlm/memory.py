"""How much memory this process has needed; imports nothing heavy, so that the question does not change the answer."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def process_peak_gib() -> float:
    """Most memory that this process has held, GiB.

    On Linux VmHWM of /proc/self/status: ru_maxrss, taken elsewhere, starts there at what the parent held when it forked.
    """
    if STATUS.is_file():
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)

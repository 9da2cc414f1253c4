"""What the tests of the benchmarks share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


def row(peer: str, median: float, ratio: float | None = None, **more) -> dict:
    spread = {} if ratio is None else {"ratio": {"median": ratio, "q10": ratio, "q90": ratio}}
    base = {
        "group": "g",
        "case": "c",
        "peer": peer,
        "unit": "s",
        "median": median,
        "q10": median,
        "q90": median,
        "rounds": 5,
    }
    return base | spread | {"command": "make", "date": "2026-01-01"} | more


def python(
    *arguments: str | Path, cwd: Path, executable: str | Path = sys.executable, **environment: str
) -> subprocess.CompletedProcess:
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")
    }  # pytest-benchmark looks for these
    env = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )

"""What Triton's compiler makes of the kernels, in processes of their own.

There the kernels are compiled, not interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROGRAMS = ("check_aot.py", "check_ptx.py", "check_step.py")


@pytest.fixture(scope="module")
def children():
    """All programs at once: each of them has one thread."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "OMP_NUM_THREADS": "1"
    }
    running = {}
    for program in PROGRAMS:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--noconftest",
            "-p",
            "no:cacheprovider",
            HERE / "compiled" / program,
        ]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running[program] = subprocess.Popen(command, cwd=ROOT, env=environment, **pipe)
    yield running
    for child in running.values():
        if child.poll() is None:
            child.kill()
            child.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_in_a_process_of_its_own(program, children, cpu_path):
    output, _ = children[program].communicate()
    assert children[program].returncode == 0, output[-6000:]

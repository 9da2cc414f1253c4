"""The proofs of the instruments, in processes of their own: there kernels are compiled, not
interpreted, and torch may be patched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PROGRAMS = ("check_ptxsim.py", "check_gpucompile.py", "check_gpurun.py")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_in_a_process_of_its_own(program):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / program)]
    done = subprocess.run(
        command, cwd=HERE, env=environment | {"OMP_NUM_THREADS": "1"}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]

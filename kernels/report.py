"""`fastlm kernels`: what each shipped configuration compiles to, moves, and would take at least."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict

from fastlm.kernels.configurations import Case, cases
from fastlm.kernels.inspect import TARGETS, read_binary, record
from fastlm.kernels.traffic import make

ROWS = 32768  # tokens of modern-253m's batch, the rows that the projected times are for
TB_S = 3.0  # what an H100 copies; a projection from it, never a measurement


def _in_interpreter(*arguments: str) -> dict:
    """The counts of fastlm.kernels.traffic, taken in a process where Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fastlm.kernels.traffic", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"counting the kernels' traffic failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _compiled(chosen: list[Case], targets: list[str]) -> list[dict]:
    """One entry for each case, target and launch."""
    found = []
    for case in chosen:
        for launch in record(lambda case=case: case.launch(make, 16)):  # type: ignore[misc]
            for target in targets:
                found.append({"case": case.name, "target": target, **asdict(read_binary(launch, target))})
    return found


def collect(targets: list[str] | None = None, against: str | None = None) -> dict:
    """Everything that `fastlm kernels` shows, as plain values.

    traffic: bytes a row of each case, moved and at least (floor), and the projected time of 32768 rows at 3 TB/s.
    binaries: for each launch and target registers, spills, shared memory, access widths in bits, fp64 and atomic
    instructions. against "liger": the same of Liger-Kernel's launches instead. Raises ValueError for a target that is not
    known or a package that is not installed.
    """
    chosen = list(TARGETS) if targets is None else targets
    unknown = [t for t in chosen if t not in TARGETS]
    if unknown:
        raise ValueError(f"fastlm kernels: no target {unknown[0]!r}; expected some of {', '.join(TARGETS)}")
    if against not in (None, "liger"):
        raise ValueError(f"fastlm kernels: cannot compare with {against!r}; expected liger")
    if against and importlib.util.find_spec("liger_kernel") is None:
        raise ValueError("fastlm kernels: liger-kernel is not installed; pip install liger-kernel")
    traffic = _in_interpreter(*([against] if against else []))
    launched = cases()
    if against:
        from fastlm.kernels.against import liger_cases

        launched = liger_cases()
    for row in traffic.values():
        row["projected_us"] = row["moved"] * ROWS / TB_S / 1e6
    return {"rows": ROWS, "tb_s": TB_S, "traffic": traffic, "binaries": _compiled(launched, chosen)}


def table(found: dict) -> str:
    """The two tables of `fastlm kernels`, as Markdown."""
    lines = [
        f"Bytes a row, counted in the interpreter; time of {found['rows']} rows at {found['tb_s']} TB/s, a projection.",
        "",
        "| op, direction, width, dtype | moved | floor | moved / floor | asked of cached operands | projected us |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["traffic"].items():
        values = (row["moved"], row["floor"], row["moved"] / row["floor"], row["cached"], row["projected_us"])
        lines.append("| {} | {:,.0f} | {:,.0f} | {:.3f} | {:,.0f} | {:,.1f} |".format(name, *values))
    lines += [
        "",
        "| op, direction, width, dtype | kernel | target | registers | spills | shared | load bits | store bits "
        "| fp64 | atomics |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["binaries"]:
        names = ("case", "kernel", "target", "registers", "spills", "shared", "load_bits", "store_bits", "fp64", "atomics")
        lines.append("| " + " | ".join(str(row[n]).strip("_") for n in names) + " |")
    return "\n".join(lines)

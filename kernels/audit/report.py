"""`fastlm kernels`: what each shipped configuration compiles to, moves, and would take at least."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, fields
from functools import partial

from fastlm.kernels.audit.configurations import Case, cases
from fastlm.kernels.audit.inspect import TARGETS, Binary, read_binary, record
from fastlm.kernels.audit.traffic import make

ROWS = 32768  # tokens of modern-253m's batch, the rows that the projected times are for
TB_S = 3.0  # what an H100 copies; a projection from it, never a measurement


def _in_interpreter(*arguments: str) -> dict:
    """The counts of fastlm.kernels.audit.traffic, taken in a process where Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fastlm.kernels.audit.traffic", *arguments],
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
        for launch in record(partial(case.launch, make, 16)):
            for target in targets:
                binary = asdict(read_binary(launch, target))
                found.append({"case": case.name, "target": target, **binary})
    return found


def collect(targets: list[str] | None = None, against: str | None = None) -> dict:
    """Everything that `fastlm kernels` shows, as plain values.

    traffic: bytes a row of each case, moved and at least (floor), and the projected time of 32768
    rows at 3 TB/s. binaries: for each launch and target registers, spills, shared memory, access
    widths in bits, fp64 and atomic instructions. against "liger": the same of Liger-Kernel's
    launches instead. Raises ValueError for a target that is not known or a package that is not
    installed.
    """
    chosen = list(TARGETS) if targets is None else targets
    unknown = [t for t in chosen if t not in TARGETS]
    if unknown:
        expected = f"some of {', '.join(TARGETS)}"
        raise ValueError(f"fastlm kernels: no target {unknown[0]!r}; expected {expected}")
    if against not in (None, "liger"):
        raise ValueError(f"fastlm kernels: cannot compare with {against!r}; expected liger")
    if against and importlib.util.find_spec("liger_kernel") is None:
        missing = "liger-kernel is not installed; pip install liger-kernel"
        raise ValueError(f"fastlm kernels: {missing}")
    traffic = _in_interpreter(*([against] if against else []))
    launched = cases()
    if against:
        from fastlm.kernels.audit.against import liger_cases

        launched = liger_cases()
    for row in traffic.values():
        row["projected_us"] = row["moved"] * ROWS / TB_S / 1e6
    return {"rows": ROWS, "tb_s": TB_S, "traffic": traffic, "binaries": _compiled(launched, chosen)}


def table(found: dict) -> str:
    """The two tables of `fastlm kernels`, as Markdown."""
    lines = [
        f"Bytes a row, counted in the interpreter; time of {found['rows']} rows at "
        f"{found['tb_s']} TB/s, a projection.",
        "",
        "| op, direction, width, dtype | moved | floor | moved / floor | asked of cached operands "
        "| projected us |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["traffic"].items():
        ratio = row["moved"] / row["floor"]
        lines.append(
            f"| {name} | {row['moved']:,.0f} | {row['floor']:,.0f} | {ratio:.3f} "
            f"| {row['cached']:,.0f} | {row['projected_us']:,.1f} |"
        )
    lines += [
        "",
        "| op, direction, width, dtype | kernel | target | registers | spills | shared | load bits "
        "| store bits | fp64 | atomics |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    columns = ("case", "kernel", "target", *(f.name for f in fields(Binary) if f.name != "kernel"))
    for row in found["binaries"]:
        lines.append("| " + " | ".join(str(row[name]) for name in columns) + " |")
    return "\n".join(lines)

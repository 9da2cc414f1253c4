"""Our kernels and Liger-Kernel's, compiled for an H100 and executed on the CPU.

    python -m bench.counted.simulated_kernels [--liger]

Executed by tests/gpuless/ptxsim; --liger needs the package liger-kernel. Columns: bytes a row,
sector bytes per byte asked for and bytes a request on the streamed operands, shared-memory bank
conflicts per thousand instructions, and the issue and special-function bounds as shares of the
memory bound (3.0 TB/s). Projections from counts, not measurements.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "gpuless"))


def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(1000, shape)


def counts(case) -> dict[str, float]:
    """What one case's launches move and would wait for, by the names of the columns."""
    from ptxsim import launches

    rows = 4 if case.width > 50000 else 72
    with launches(target=90) as record:
        case.launch(make, rows)
    bounds = [stats.projected_us() for _, stats in record]
    memory, issue, mufu = (sum(b[k] for b in bounds) for k in ("memory", "issue", "mufu"))
    streamed = [t for _, stats in record for name, t in stats.tensors.items() if name in case.bulk]
    asked = sum(t.load_bytes + t.store_bytes for t in streamed)
    sectors = 32 * sum(t.load_sectors + t.store_sectors for t in streamed)
    requests = sum(t.load_requests + t.store_requests for t in streamed)
    conflicts = sum(s.bank_conflicts for _, s in record) / sum(
        s.instructions.total() for _, s in record
    )
    return {
        "bytes a row": asked / rows,
        "sector bytes / byte": sectors / asked,
        "bytes / request": asked / requests,
        "conflicts / 1000": 1e3 * conflicts,
        "issue / memory": issue / memory,
        "special / memory": mufu / memory,
    }


def chosen_cases(liger: bool) -> list:
    if liger:
        from fastlm.kernels.audit.against import liger_cases

        return liger_cases()
    from fastlm.kernels.audit.configurations import cases

    return cases()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--liger", action="store_true")
    args = parser.parse_args()
    formats = ("{:,.0f}", "{:.3f}", "{:.0f}", "{:.2f}", "{:.2f}", "{:.2f}")
    for i, case in enumerate(chosen_cases(args.liger)):
        found = counts(case)
        if i == 0:
            print("| " + " | ".join(("case", *found)) + " |\n" + "|---" * (len(found) + 1) + "|")
        cells = [f.format(v) for f, v in zip(formats, found.values(), strict=True)]
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Our kernels' and Liger-Kernel's compiled for an H100 and executed on the CPU: sectors, requests, conflicts, lower bounds.

    python bench/simulated_kernels.py [--liger]

It needs ptxsim.py in ../shared/tools; --liger also the package liger-kernel. Columns: bytes a row, sector bytes per byte
asked for and bytes a request on the streamed operands, shared-memory bank conflicts per thousand instructions, and the issue
and special-function bounds as shares of the memory bound (3.0 TB/s). Projections from counts, not measurements.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "shared" / "tools")]


def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(1000, shape)


def row(case) -> str:
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
    conflicts = 1e3 * sum(s.bank_conflicts for _, s in record) / sum(s.instructions.total() for _, s in record)
    counts = f"{asked / rows:,.0f} | {sectors / asked:.3f} | {asked / requests:.0f} | {conflicts:.2f}"
    return f"| {case.name} | {counts} | {issue / memory:.2f} | {mufu / memory:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--liger", action="store_true")
    args = parser.parse_args()
    if args.liger:
        from fastlm.kernels.against import liger_cases as chosen
    else:
        from fastlm.kernels.configurations import cases as chosen
    heads = ("case", "bytes a row", "sector bytes / byte", "bytes / request", "conflicts / 1000", "issue / memory")
    print("| " + " | ".join((*heads, "special / memory")) + " |")
    print("|---|---|---|---|---|---|---|")
    for case in chosen():
        print(row(case), flush=True)


if __name__ == "__main__":
    main()

"""Write docs/benchmarks.md and its charts from the results of the benchmarks.

python -m bench.scripts.write_page [--results bench/results] [--out docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.harness.page import write
from fastlm.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    args = parser.parse_args(argv)
    try:
        page, *charts = write(args.results, args.out)
    except UserError as error:
        print(f"write_page: {error}", file=sys.stderr)
        return 2
    print(f"{page} and {len(charts)} charts")
    return 0


if __name__ == "__main__":
    sys.exit(main())

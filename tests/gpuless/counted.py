"""Run one fastlm command in this process on the stand-in GPU and note what each step asked for.

    fakegpu PYTHON tests/gpuless/counted.py FILE pretrain --compile ...

FILE gets a JSON object: "exit", the command's exit code; "marks", one object for each training step
and each written token: the stand-in's counts so far, the graphs that torch.compile has made so far
and the allocator's peak; "end", the same at the end. The marks are set from outside, around
functions of fastlm that run once a step: fastlm itself knows nothing of this.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import fastlm.generate  # noqa: E402
from fastlm.cli import main  # noqa: E402
from fastlm.monitor import Monitor  # noqa: E402

# Called once in every training step, after the optimizer; and once for every token written.
ONCE_A_STEP = ((Monitor, "step"), (fastlm.generate, "read_later"))


def so_far() -> dict[str, Any]:
    """What the GPU was asked for until now, graphs compiled, and the most memory in use."""
    return {
        **torch.fakegpu_counts(),
        "compiled graphs": counters["stats"]["unique_graphs"],
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }


def noting(function: Callable[..., Any], name: str, marks: list[dict]) -> Callable[..., Any]:
    """The function, which first adds a mark."""

    def noted(*args: Any, **options: Any) -> Any:
        marks.append({"at": name, **so_far()})
        return function(*args, **options)

    return noted


def run(argv: list[str]) -> dict[str, Any]:
    """The command's exit code and its marks; an error nobody caught is 1, and its traceback."""
    marks: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for owner, name in ONCE_A_STEP:
            noted = noting(getattr(owner, name), name, marks)
            stack.enter_context(mock.patch.object(owner, name, noted))
        try:
            code = main(argv)
        except SystemExit as error:  # --help
            code = error.code if isinstance(error.code, int) else 1
        except Exception:
            traceback.print_exc()
            code = 1
    return {"exit": code, "marks": marks, "end": so_far()}


if __name__ == "__main__":
    found = run(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(found["exit"])

"""Run one fastlm command in this process on the stand-in GPU and note what each step asked for.

    fakegpu PYTHON tests/gpuless/counted.py FILE pretrain --compile ...

FILE gets a JSON object: "exit", the command's exit code; "marks", one object for each training step
and each written token: the stand-in's counts so far, the graphs that torch.compile has made so far
and the allocator's peak; "kernels", the launches of each kernel, by name, in the last step. The
marks are set from outside, around functions of fastlm that run once a step: fastlm itself knows
nothing of this.
"""

from __future__ import annotations

import json
import re
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

import fastlm.inference.generation  # noqa: E402
from fastlm.cli import main  # noqa: E402
from fastlm.monitor import Monitor  # noqa: E402

# Called once in every training step, after the optimizer; and once for every token written.
ONCE_A_STEP = ((Monitor, "step"), (fastlm.inference.generation, "read_later"))
ATTENTION = re.compile("flash|fmha|cudnn")  # in the names of PyTorch's attention kernels


def so_far() -> dict[str, Any]:
    """What the GPU was asked for until now, graphs compiled, and the most memory in use."""
    launches = torch.fakegpu_launches().items()
    return {
        **torch.fakegpu_counts(),
        "attention launches": sum(n for name, n in launches if ATTENTION.search(name)),
        "compiled graphs": counters["stats"]["unique_graphs"],
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }


def noting(
    function: Callable[..., Any], name: str, marks: list[dict], kernels: list[dict]
) -> Callable[..., Any]:
    """The function, which first adds a mark, and keeps the kernels' launches until now."""

    def noted(*args: Any, **options: Any) -> Any:
        marks.append({"at": name, **so_far()})
        kernels[:] = [*kernels[-1:], torch.fakegpu_launches()]
        return function(*args, **options)

    return noted


def run(argv: list[str]) -> dict[str, Any]:
    """The command's exit code and its marks; an error nobody caught is 1, and its traceback."""
    marks: list[dict[str, Any]] = []
    kernels: list[dict[str, int]] = []  # at the last two marks
    with ExitStack() as stack:
        for owner, name in ONCE_A_STEP:
            noted = noting(getattr(owner, name), name, marks, kernels)
            stack.enter_context(mock.patch.object(owner, name, noted))
        try:
            code = main(argv)
        except SystemExit as error:  # --help
            code = error.code if isinstance(error.code, int) else 1
        except Exception:
            traceback.print_exc()
            code = 1
    return {"exit": code, "marks": marks, "kernels": in_last_step(kernels)}


def in_last_step(kernels: list[dict[str, int]]) -> dict[str, int]:
    """Launches between the last two marks, the most frequent kernel first."""
    if len(kernels) < 2:
        return {}
    before, after = kernels
    found = {name: n - before.get(name, 0) for name, n in after.items()}
    return {name: n for name, n in sorted(found.items(), key=lambda row: -row[1]) if n}


if __name__ == "__main__":
    found = run(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(found["exit"])

"""Where a step's time on the GPU goes: a torch.profiler trace, its kernels added up by category.

A kernel belongs to the first category that fits: what was launched by an optimizer's step, then by
the kernel's name attention, matmuls, copies and what Inductor generated, then ours (launched by one
of fastlm's operators), then all other.
"""

from __future__ import annotations

import bisect
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.harness.gpu_timing import on_gpu, rehearsing

OPTIMIZER = "optimizer"  # the name of the range around an optimizer's step
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
BY_NAME = {
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "triton_mm", "triton_tem", "splitk"),
    "copies": ("memcpy", "memset", "copy_kernel", "catarraybatched"),
    "generated": ("triton_poi", "triton_red", "triton_per", "triton_for"),
}
CATEGORIES = ("matmul", "attention", "ours", OPTIMIZER, "generated", "copies", "other")


class Ranges:
    """Intervals of one kind on the host, asked whether a moment lies in one of them."""

    def __init__(self, spans: Iterable[tuple[float, float]]):
        self.spans: list[list[float]] = []
        for start, end in sorted(spans):
            if self.spans and start <= self.spans[-1][1]:
                self.spans[-1][1] = max(end, self.spans[-1][1])
            else:
                self.spans.append([start, end])

    def __contains__(self, moment: float) -> bool:
        at = bisect.bisect_right(self.spans, moment, key=lambda span: span[0]) - 1
        return at >= 0 and moment <= self.spans[at][1]


def by_name(kernel: str) -> str:
    """The category that a kernel's name tells, or nothing."""
    low = kernel.lower()
    fits = (name for name, words in BY_NAME.items() if any(word in low for word in words))
    return next(fits, "")


def categories(trace: dict[str, Any], steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds and kernels a step by category, of a Chrome trace of so many steps."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    launched: dict[int, tuple[int, float]] = {}  # correlation -> thread and moment of the launch
    ours: dict[int, list[tuple[float, float]]] = defaultdict(list)  # by thread
    stepping = []
    for event in events:
        span = (event["ts"], event["ts"] + event["dur"])
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]:
            launched[event["args"]["correlation"]] = (event["tid"], event["ts"])
        elif event["cat"] == "cpu_op" and event["name"].startswith("fastlm::"):
            ours[event["tid"]].append(span)
        elif event["cat"] == "user_annotation" and event["name"] == OPTIMIZER:
            stepping.append(span)
    in_optimizer = Ranges(stepping)
    in_ours = {thread: Ranges(spans) for thread, spans in ours.items()}
    found = {name: {"ms": 0.0, "kernels": 0.0} for name in CATEGORIES}
    for event in events:
        if event["cat"] not in KERNELS:
            continue
        thread, moment = launched.get(event["args"].get("correlation"), (-1, -1.0))
        if moment in in_optimizer:
            category = OPTIMIZER
        else:
            own = "ours" if moment in in_ours.get(thread, ()) else "other"
            category = by_name(event["name"]) or own
        found[category]["ms"] += event["dur"] / 1e3 / steps
        found[category]["kernels"] += 1 / steps
    return found


def longest(trace: dict[str, Any], steps: int, count: int = 20) -> list[list[Any]]:
    """[name, milliseconds a step] of the kernels that take the most time."""
    total: Counter[str] = Counter()
    for event in trace["traceEvents"]:
        if event.get("cat") in KERNELS:
            total[event["name"]] += event["dur"] / 1e3 / steps
    return [[name[:120], milliseconds] for name, milliseconds in total.most_common(count)]


def mark_steps(optimizers: Iterable[Any]) -> None:
    """Make each optimizer's step a named range of the profile."""

    def in_range(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            with torch.profiler.record_function(OPTIMIZER):
                return step(*arguments, **named)

        return run

    for optimizer in optimizers:
        optimizer.step = in_range(optimizer.step)


class Profile:
    """torch.profiler between two steps, whose trace goes into a file.

    On the stand-in for a GPU the trace is empty: NVIDIA's tracing library needs a real driver.
    """

    def __init__(self, file: Path):
        self.file = file
        self.profiler: Any = None
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        if not (on_gpu() and rehearsing()):
            self.profiler = torch.profiler.profile(activities=kinds)

    def start(self) -> None:
        if on_gpu():
            torch.cuda.synchronize()  # what was launched before is none of it
        if self.profiler:
            self.profiler.start()

    def stop(self) -> None:
        if on_gpu():
            torch.cuda.synchronize()
        if self.profiler:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.file))
        else:
            self.file.write_text('{"traceEvents": []}', encoding="utf-8")

    def trace(self) -> dict[str, Any]:
        return json.loads(self.file.read_text(encoding="utf-8"))

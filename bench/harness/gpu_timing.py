"""Times on a GPU: calls recorded in a CUDA graph over rotating buffers, events around its replays.

Contenders take turns. A graph takes the launches' cost on the host out of the measurement. Each
contender's calls go over as many sets of buffers as fill a hundredth of the GPU's memory, many
times its L2 cache, and what they return is kept until the recording ends: every call reads and
writes memory that no cache holds. Without a GPU the same lines run once on the CPU, as a rehearsal,
with Triton's interpreter in the kernels' place.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import cache

import torch

Call = Callable[[], object]

# What a contender may raise when it is built, compiled or run: its case notes it and goes on.
FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
NOT_INTERPRETED: tuple[
    type[Exception], ...
] = ()  # a peer that Triton's interpreter cannot run: no failure, without a GPU
try:
    from triton.errors import TritonError
    from triton.runtime.errors import InterpreterError
except ImportError:
    pass
else:
    FAILURES += (TritonError,)
    NOT_INTERPRETED += (InterpreterError,)


def on_gpu() -> bool:
    return torch.cuda.is_available()


def rehearsing() -> bool:
    """Whether there is no GPU that computes: none at all, or the stand-in for one."""
    return not on_gpu() or hasattr(torch, "fakegpu_counts")


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


@cache
def stream() -> torch.cuda.Stream:
    """One stream for building, recording, replaying: a backward runs where its forward ran."""
    return torch.cuda.Stream()


def on_stream() -> contextlib.AbstractContextManager:
    """Inside, everything happens on that stream."""
    return torch.cuda.stream(stream()) if on_gpu() else contextlib.nullcontext()


def say(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def copies(call_bytes: int) -> int:
    """Sets of buffers to rotate over: together a hundredth of the GPU's memory, at most 64 sets."""
    if rehearsing():
        return 1
    return max(1, min(64, torch.cuda.get_device_properties(0).total_memory // 100 // call_bytes))


def recorded(build: Callable[[], Call], sets: int) -> tuple[Call, str]:
    """(a turn, how it runs): build() makes a set of buffers and returns the call on them.

    The turn makes each set's call once.
    """
    if not on_gpu():
        one = build()
        one()
        return one, "interpreted on the CPU"
    with on_stream():
        calls = [build() for _ in range(sets)]
        for call in (calls[0], *calls):  # compiles, warms up
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream()):
            kept = [call() for call in calls]
    except RuntimeError as error:
        torch.cuda.synchronize()
        return lambda: [call() for call in calls], f"launched one by one, no graph: {say(error)}"
    del kept  # the graph's memory stays as it was
    torch.cuda.synchronize()

    def replay() -> None:
        assert calls  # the buffers live as long as the graph
        graph.replay()

    return replay, "graph"


def in_turns(turns: dict[str, Call], rounds: int, per_turn: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round, divided by the calls in a turn."""
    if not on_gpu():
        times: dict[str, list[float]] = {}
        for name, turn in turns.items():
            start = time.perf_counter()
            turn()
            times[name] = [1e3 * (time.perf_counter() - start)]
        return times
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
        name: [] for name in turns
    }
    with on_stream():
        for round_ in range(
            rounds + 1
        ):  # the first is a warm-up; nothing waits in between, so the GPU is never idle
            for name, turn in turns.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                turn()
                end.record()
                if round_:
                    events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) / per_turn for start, end in pairs]
        for name, pairs in events.items()
    }


def peak_bytes(turn: Call) -> int:
    """Most bytes that a turn allocates beside what was there before; 0 without a GPU."""
    if not on_gpu():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with on_stream():
        turn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def energy_meter() -> Callable[[], float] | None:
    """A function that reads the GPU's own meter, joules; None without NVML or a meter."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        gpu = pynvml.nvmlDeviceGetHandleByUUID(name)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except pynvml.NVMLError:  # no driver, a part of a GPU (MIG), or no meter on this device
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3

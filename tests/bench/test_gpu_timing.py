"""Timing by CUDA graphs and events, with torch.cuda answered on the CPU."""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench.harness import gpu_timing


class Event:
    """Stands in for a CUDA event."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """torch.cuda answers gpu_timing.py on the CPU: a recorded graph replays nothing."""
    arguments = inspect.signature(torch.cuda.graph.__init__)

    @contextlib.contextmanager
    def graph(*given, **named):
        arguments.bind(None, *given, **named)
        yield

    answers = {
        "is_available": lambda: True,
        "Stream": object,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "Event": Event,
        "synchronize": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=80 * 2**30, uuid="1"),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 5,
        "max_memory_allocated": lambda: 12,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    gpu_timing.stream.cache_clear()
    yield gpu_timing
    gpu_timing.stream.cache_clear()


def test_the_lines_that_only_a_gpu_runs(pretended_gpu, monkeypatch):
    gpu, built, called = pretended_gpu, [], []
    assert gpu.copies(16 << 20) == 51
    assert gpu.copies(1 << 40) == 1
    assert gpu.copies(1) == 64

    def build():
        number = len(built)
        built.append(number)
        return lambda: called.append(number)

    turn, how = gpu.recorded(build, 3)
    assert how == "graph"
    assert called == [0, 0, 1, 2, 0, 1, 2], "compiled, warmed up, then recorded once each"
    times = gpu.in_turns({"ours": turn, "peer": lambda: time.sleep(0.004)}, rounds=4, per_turn=2)
    assert len(times["ours"]) == len(times["peer"]) == 4
    assert 1.9 < min(times["peer"]) < 50
    assert gpu.peak_bytes(turn) == 7

    def no_graph(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", no_graph)
    called.clear()
    turn, how = gpu.recorded(build, 2)
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert how == f"launched one by one, no graph: {reason}"
    called.clear()
    turn()
    assert called == [3, 4]


def test_energy_is_read_from_the_meter_and_there_is_none_without_one(pretended_gpu, monkeypatch):
    class NoMeter(Exception):
        pass

    def refuse(handle: int) -> int:
        raise NoMeter

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1": 7}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1500 * handle,
        NVMLError=NoMeter,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert pretended_gpu.energy_meter()() == 10.5
    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert pretended_gpu.energy_meter() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert pretended_gpu.energy_meter() is None

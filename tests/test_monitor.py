"""What a run records: true speeds, whole lines, and the GPU's power by NVML's published calls."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch
from rich.console import Console

from fastlm import monitor
from fastlm.errors import UserError
from fastlm.evaluation.score import perplexity
from fastlm.monitor import Monitor, Power, keep_lines, sparkline

CPU = torch.device("cpu")


def make(tmp_path, **changes) -> Monitor:
    arguments = {
        "steps": 3,
        "state": {"step": 0, "tokens": 0},
        "flops_per_token": 1e6,
        "device": CPU,
        "console": Console(quiet=True),
    }
    return Monitor(tmp_path, **(arguments | changes))


def test_speed_counts_the_step_and_not_what_happens_between_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "ceiling", lambda device: (1e9, "of matmul rate"))
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock.now)
    m = make(tmp_path)
    for step in (1, 2, 3):
        clock.now += 0.25
        m.step(step, {"loss": torch.tensor(2.0)}, torch.tensor(1.0), 0.1, {"tokens": 100 * step})
        clock.now += 7.0  # a validation
        m.restart_clock()
    m.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert [r["tokens"] for r in rows] == [100, 200, 300]
    for r in rows:
        assert r["seconds"] == pytest.approx(0.25)
        assert r["tokens_per_s"] == pytest.approx(400)
        assert r["share_of_peak"] == pytest.approx(400 * 1e6 / 1e9)


def test_on_a_gpu_a_step_is_read_when_the_next_is_noted(tmp_path, monkeypatch):
    """Each step records an event behind its figures' copy.

    The one before is waited for, never the newest.
    """
    happened = []

    class Event:
        def __init__(self, blocking):
            assert blocking  # the host sleeps rather than spins

        def record(self):
            happened.append(f"record {happened.count('wait') + 1}")

        def synchronize(self):
            happened.append("wait")

    m = make(tmp_path)
    m.device = types.SimpleNamespace(type="cuda")  # nothing but its type is asked
    monkeypatch.setattr(monitor, "peak_gib", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    lines = lambda: (tmp_path / "metrics.jsonl").read_text().count("\n")  # noqa: E731
    for step in (1, 2):
        m.step(step, {"loss": torch.tensor(2.0)}, torch.tensor(1.0), 0.1, {"tokens": 100 * step})
        assert lines() == step - 1
    assert happened == ["record 1", "wait", "record 2"]
    m.flush()
    assert lines() == 2
    m.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    m = make(tmp_path)
    with pytest.raises(UserError, match="training has diverged"):
        m.step(1, {"loss": torch.tensor(value)}, torch.tensor(1.0), 0.1, {"tokens": 100})
    m.close()


def test_lines_after_the_checkpoint_and_a_line_cut_short_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n'
    path.write_text(whole + '{"step": 2, "validation_loss": 1}\n{"step": 3, "lo')
    assert keep_lines(path, 2) == [3.0, 2.5]
    assert path.read_text().count("\n") == 3
    assert keep_lines(path, 1) == [3.0]
    assert keep_lines(tmp_path / "none", 5) == []


def fake_nvml(monkeypatch, **answers) -> types.SimpleNamespace:
    """nvidia-ml-py's published names; milliwatts and millijoules as NVML gives them.

    Returns the clock.
    """
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})

    def not_supported(handle):
        raise nvml.NVMLError("not supported")

    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: f"handle of {uuid}"
    nvml.nvmlDeviceGetTotalEnergyConsumption = answers.get("energy", not_supported)
    nvml.nvmlDeviceGetPowerUsage = answers.get("power", not_supported)
    nvml.nvmlDeviceGetUtilizationRates = answers.get("rates", not_supported)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc")
    )
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock.now)
    return clock


def test_power_is_read_through_nvml_at_most_once_a_second(monkeypatch):
    joules = iter([1000_000, 1004_000])
    clock = fake_nvml(
        monkeypatch,
        energy=lambda handle: next(joules),
        power=lambda handle: 350_000,
        rates=lambda handle: types.SimpleNamespace(gpu=97, memory=50),
    )
    power = Power(torch.device("cuda"))
    assert power.handle == "handle of GPU-abc"
    clock.now += 0.4
    assert power.read(tokens=500) == {}
    clock.now += 0.7
    figures = power.read(tokens=1500)
    assert figures == {"watts": 350.0, "utilisation": 97, "joules_per_token": pytest.approx(0.002)}
    clock.now += 0.9
    assert power.read(tokens=500) == {}


def test_what_nvml_does_not_tell_is_left_out(monkeypatch):
    """As on a part of a GPU (MIG) or a vGPU, where some questions end in an error."""
    clock = fake_nvml(monkeypatch, power=lambda handle: 200_000)
    power = Power(torch.device("cuda"))
    clock.now += 2
    assert power.read(tokens=10) == {"watts": 200.0}
    clock = fake_nvml(monkeypatch)
    power = Power(torch.device("cuda"))
    clock.now += 2
    assert power.read(tokens=10) == {}


def test_power_is_silent_without_nvml(monkeypatch):
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})

    def no_driver():
        raise nvml.NVMLError("driver not loaded")

    nvml.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert Power(torch.device("cuda")).read(10) == {}
    assert Power(CPU).read(10) == {}


def test_sparkline_shows_the_course_in_at_most_its_width():
    assert sparkline([]) == ""
    assert sparkline([1.0]) == "▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(1000)))) <= 60


def test_perplexity_is_exp_of_nats():
    assert perplexity(math.log(30)) == pytest.approx(30)
    assert perplexity(1e6) == math.inf


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "7",
        '{"step": "2"}',
        '{"step": 2, "loss": "low"}',
        '{"step": true}',
        "[" * 9999,
        "\ufffd",
    ],
)
def test_a_damaged_line_of_metrics_goes_and_the_rest_stays(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 3.0}}\n{line}\n{{"step": 2, "loss": 2.5}}\n')
    assert keep_lines(path, 5) == [3.0, 2.5]
    assert path.read_text() == '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n'

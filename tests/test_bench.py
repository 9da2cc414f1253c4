"""The benchmarks' machinery: what they write and compare, what the report makes of it, and the rehearsal of `make gpu`."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from fastlm import bench_report
from fastlm.cli import main
from fastlm.config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import optimizer_step  # noqa: E402
import results  # noqa: E402

SLEEPERS = """
import time

def test_sleepers(take_turns, measuring):
    take_turns(lambda: time.sleep(0.002), {"slow": lambda: time.sleep(SLOW), "copy": lambda: time.sleep(0.001)}, rounds=5)

def test_without_its_peer(record, benchmark):
    record(peer="liger", missing="liger-kernel is not installed")
"""

ENOUGH = ("torch", "triton", "numpy", "pytest", "pytest-benchmark")


def with_requirements(names: Iterable[str]) -> set[str]:
    """The packages and all that they need themselves."""
    found: set[str] = set()
    for name in names:
        if name not in found:
            found.add(name)
            needed = (Requirement(line) for line in metadata.requires(name) or [])
            here = [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
            found |= with_requirements(n for n in here if n not in found)
    return found


def bare_python(folder: Path) -> Path:
    """A Python whose only packages are those that `make gpu` may ask for."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for package in with_requirements(ENOUGH):
        distribution = metadata.distribution(package)
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():  # nvidia/, which many share
                (site / name).symlink_to(Path(str(distribution.locate_file(name))))
    return folder / "bin" / "python"


def row(peer: str, median: float, ratio: float | None = None, **more) -> dict:
    spread = {} if ratio is None else {"ratio": {"median": ratio, "q10": ratio, "q90": ratio}}
    base = {"group": "g", "case": "c", "peer": peer, "unit": "s", "median": median, "q10": median, "q90": median, "rounds": 5}
    return base | spread | {"command": "make", "date": "2026-01-01"} | more


def python(
    *arguments: str | Path, cwd: Path, executable: str | Path = sys.executable, **environment: str
) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}  # pytest-benchmark looks for these
    env = inherited | {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def bench(tmp_path) -> Path:
    """A benchmark folder of its own whose one contender sleeps twice as long as ours."""
    for name in ("conftest.py", "measure.py", "results.py"):
        shutil.copy(BENCH / name, tmp_path)
    (tmp_path / "test_sleepers.py").write_text(SLEEPERS.replace("SLOW", "0.004"), encoding="utf-8")
    return tmp_path


def test_a_row_is_replaced_by_a_later_one_of_the_same_case_and_contender():
    old = [row("ours", 1.0), row("liger", 2.0, 2.0), row("eager", 3.0, 3.0)]
    new = [row("ours", 1.5), {"group": "g", "case": "c", "peer": "liger", "failed": "out of memory"}]
    merged = {r["peer"]: r for r in results.merged(old, new)}
    assert merged["ours"]["median"] == 1.5
    assert merged["liger"]["failed"] == "out of memory"
    assert merged["eager"]["median"] == 3.0
    again = {r["peer"]: r for r in results.merged(list(merged.values()), [row("liger", 2.5, 2.5)])}
    assert "failed" not in again["liger"]


def test_ratios_are_taken_round_by_round():
    rows = results.timed_rows("g", "c", "s", {"ours": [1.0, 2.0, 4.0], "peer": [2.0, 4.0, 8.0]})
    assert rows[1]["ratio"] == {"median": 2.0, "q10": 2.0, "q90": 2.0}
    assert rows[0]["median"] == 2.0
    assert "ratio" not in rows[0]


def test_only_ratios_that_fall_beyond_the_noise_are_regressions():
    old = [row("ours", 1.0), row("peer", 2.0, 2.0), row("gone", 1.0, 1.0)]
    within = 2.0 * (1 - results.NOISE) + 0.01
    assert not results.falls(old, [row("ours", 9.0), row("peer", 9.0, within)])
    noisy = row("peer", 2.0, 1.6)
    noisy["ratio"]["q90"] = 2.1
    assert not results.falls(old, [noisy])
    before = row("peer", 2.0, 2.0)
    before["ratio"]["q10"] = 1.5
    assert not results.falls([before], [row("peer", 2.0, 1.6)])
    assert "from 2.00 to 1.60" in results.falls(old, [row("peer", 2.0, 1.6)])[0]
    assert "out of memory" in results.falls(old, [{"group": "g", "case": "c", "peer": "peer", "failed": "out of memory"}])[0]
    assert not results.falls(old, [{"group": "g", "case": "c", "peer": "never", "failed": "out of memory"}])


def test_compare_fails_on_a_doctored_file(bench):
    first = python("-m", "pytest", "-q", ".", "--benchmark", "--results", "now.json", cwd=bench)
    assert first.returncode == 0, first.stdout
    found = json.loads((bench / "now.json").read_text())
    assert found["kind"] == "measured"
    assert {"torch", "python"} <= set(found["versions"])
    rows = {r["peer"]: r for r in found["rows"]}
    assert 1.5 < rows["slow"]["ratio"]["median"] < 2.5
    assert rows["liger"]["missing"] == "liger-kernel is not installed"
    assert "median" not in rows["liger"]
    assert rows["ours"]["command"] == "python -m pytest -q . --benchmark --results now.json"
    rows["slow"]["ratio"] = {"median": 4.0, "q10": 3.9, "q90": 4.1}
    (bench / "old.json").write_text(json.dumps(found), encoding="utf-8")
    arguments = ("-m", "pytest", "-q", ".", "--benchmark", "--results", "again.json", "--compare", "old.json")
    doctored = python(*arguments, cwd=bench)
    assert doctored.returncode == 1
    assert "old.json: 2 ratios compared" in doctored.stdout
    assert "slow, s: the ratio fell from 4.00" in doctored.stdout


def test_a_comparison_passes_on_honest_ratios_and_fails_where_there_are_none():
    old = [row("ours", 1.0), row("peer", 2.0, 2.0)]
    assert results.comparison(old, [row("peer", 2.0, 1.9)]) == (
        ["1 ratios compared, 0 of the file's ratios were not taken this time"], False
    )  # fmt: skip
    assert results.comparison(old, [row("ours", 1.0)])[1]


def test_a_case_that_raises_and_one_that_was_not_reached_are_rows(bench):
    (bench / "test_sleepers.py").write_text("def test_broken(benchmark):\n    benchmark(lambda: 1 / 0)\n", encoding="utf-8")
    assert python("-m", "pytest", "-q", ".", "--results", "now.json", cwd=bench).returncode == 1
    rows = json.loads((bench / "now.json").read_text())["rows"]
    assert [r["failed"] for r in rows] == ["ZeroDivisionError: division by zero"]
    (bench / "test_skipped.py").write_text("import pytest\npytest.importorskip('absent', reason='no peer')\n", encoding="utf-8")
    assert python("-m", "pytest", "-q", ".", "--results", "late.json", "--seconds", "0", cwd=bench).returncode == 0
    rows = json.loads((bench / "late.json").read_text())["rows"]
    assert {r["group"]: r["missing"] for r in rows} == {"sleepers": "not run: 0 seconds were over", "skipped": "no peer"}


@pytest.mark.slow
def test_every_cpu_case_runs_once_small():
    done = python("-m", "pytest", "-q", "bench", "-k", "not gpu", cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and its cases are measured")
def test_without_a_gpu_its_cases_are_not_measured():
    done = python("-m", "pytest", "-q", "bench", "--benchmark", "--collect-only", cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "deselected" in done.stdout
    assert "test_gpu" not in done.stdout


@pytest.mark.slow
def test_make_gpu_rehearsed_with_nothing_but_torch_triton_numpy_and_pytest(tmp_path):
    """Tests, every part of the benchmarks and the table, in Triton's interpreter; other packages cannot be imported."""
    out = tmp_path / "gpu.json"
    done = python("bench/gpu.py", "--tests", "tests/kernels/test_embedding.py", "--results", out,
                  "--only", "pretrain or loss or (swiglu and 4096x4096 and both)", cwd=ROOT,
                  executable=bare_python(tmp_path / "bare"))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["kind"] == "rehearsal"
    rows = {(r["group"], r["case"], r["peer"]): r for r in found["rows"]}
    tests = rows["correctness", "test_embedding.py", "ours"]["measures"]
    assert tests["failed"] == 0
    assert tests["passed"] >= 30
    assert rows["gpu_kernels", "swiglu 4096x4096 both", "inductor"]["ratio"]["median"] > 0
    assert rows["gpu_kernels", "swiglu 4096x4096 both", "liger"]["missing"] == "liger-kernel is not installed"
    assert rows["gpu_head", "loss", "matmul"]["median"] > 0
    plain, ours = (rows["gpu_training", "pretrain", p]["median"] for p in ("plain PyTorch compiled", "ours"))
    assert plain < ours / 5, "the plain model must not run our kernels, which take their time in the interpreter"
    last = done.stdout.splitlines()
    assert last[-1].startswith(str(out))
    assert any(line.startswith(f"tests: {tests['passed']:.0f} passed, 0 failed") for line in last[-5:])


BROKEN = """
import gpu_peers
def broken(op, given):
    raise RuntimeError("no such kernel image")
gpu_peers.liger, gpu_peers.absent = broken, lambda package, module: ""
"""


def test_a_contender_that_fails_is_recorded_and_the_others_are_measured(tmp_path):
    (tmp_path / "with_a_broken_peer.py").write_text(BROKEN, encoding="utf-8")
    out = tmp_path / "now.json"
    done = python("-m", "pytest", "-q", "-p", "with_a_broken_peer", "bench/test_gpu_kernels.py", "-k", "swiglu-4096x4096-both",
                  "--results", out, cwd=ROOT, PYTHONPATH=os.pathsep.join([str(tmp_path), str(BENCH)]))  # fmt: skip
    assert done.returncode == 1
    rows = {r["peer"]: r for r in json.loads(out.read_text())["rows"]}
    assert rows["liger"]["failed"] == "RuntimeError: no such kernel image"
    assert rows["case"]["failed"].startswith("AssertionError: failed: liger")
    assert {peer for peer, r in rows.items() if "median" in r} == {"ours", "eager", "inductor", "copy"}
    assert "FAILED swiglu 4096x4096 both, liger: RuntimeError" in bench_report.short_table(list(rows.values()))


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
    """What gpu_timing.py asks of torch.cuda, answered on the CPU: a recorded graph replays nothing."""
    import gpu_timing

    arguments = inspect.signature(torch.cuda.graph.__init__)

    @contextlib.contextmanager
    def graph(*given, **named):
        arguments.bind(None, *given, **named)
        yield

    answers = {
        "is_available": lambda: True, "Stream": object, "stream": lambda stream: contextlib.nullcontext(), "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "Event": Event, "synchronize": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=80 * 2**30, uuid="1"),
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 5, "max_memory_allocated": lambda: 12,
    }  # fmt: skip
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
    assert how == "launched one by one, no graph: RuntimeError: operation not permitted when stream is capturing"
    called.clear()
    turn()
    assert called == [3, 4]


def test_energy_is_the_meter_s_difference_and_nothing_without_one(pretended_gpu, monkeypatch):
    meter = iter([1000, 4000])
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1": 7}[uuid],
                           nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(meter))  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    spent, turns = pretended_gpu.joules(lambda: time.sleep(0.01), 0.05)
    assert spent == 3.0
    assert 1 <= turns <= 5
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert pretended_gpu.joules(lambda: None, 0.0) is None


def test_the_page_shows_measured_missing_failed_and_projected_each_for_what_it_is(tmp_path):
    about = {"device": "a machine", "date": "2026-01-01", "hardware": {"cpus": 2}, "versions": {"torch": "2.13"}}
    rows = [row("ours", 0.0123, measures={"gb_per_second": 1234.5}), row("eager", 0.02, 1.6), row("copy", 0.01, 0.82),
            {"group": "g", "case": "c", "peer": "liger", "missing": "liger-kernel is not installed", "command": "make"},
            {"group": "g", "case": "c", "peer": "cut", "failed": "Error: out | of memory", "command": "make"}]  # fmt: skip
    projected = [{"group": "p", "case": "step", "peer": "ours", "measures": {"launches": 7}, "command": "count"}]
    for name, kind, its in (("a.json", "measured", rows), ("b.json", "projected", projected)):
        (tmp_path / name).write_text(json.dumps({"kind": kind, **about, "rows": its}), encoding="utf-8")
    (tmp_path / "notes.md").write_text("# Notes\n\n## g\n\nWords about g.\n\n## projected\n\nFrom counts.\n", encoding="utf-8")
    text, charts = bench_report.page(tmp_path)
    assert "| c | 0.0123 s, 1,234 GB/s | 0.0200, **1.60× (1.60 to 1.60)** | missing: liger-kernel is not installed |" in text
    assert "FAILED: Error: out \\| of memory" in text
    assert "82.0% (82.0 to 82.0)" in text
    assert text.index("Words about g.") < text.index("| c |") < text.index("# Projections") < text.index("| step | ours | 7 |")
    assert "Reproduce: `make`" in text
    assert "cpus: 2; torch: 2.13." in text
    for svg in charts.values():
        ElementTree.fromstring(svg)
    assert "eager" in charts["a-g.svg"]


def test_the_command_writes_the_page_and_says_what_is_wrong(tmp_path, capsys):
    assert main(["bench", "report", "--results", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 2
    assert "no results in" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    assert main(["bench", "report", "--results", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 2
    assert "a.json is not a result file" in capsys.readouterr().err
    assert main(["bench"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_the_gpu_program_costs_no_more_than_the_results_say(stage):
    """Bytes moved, launches and bytes saved of the compiled step of `tiny`, counted again."""
    done = python("bench/compiled_step.py", "--preset", "tiny", "--rows", "32", "--seq-len", "256", "--stage", stage, "--json",
                  cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    now, kept = json.loads(done.stdout.splitlines()[-1]), results.read(BENCH / "results" / "h100-projected.json")["rows"]
    units = {"GB through kernels that are not matmuls": "traffic_gb", "launches of them": "launches",
             "GB saved for the backward": "saved_gb"}  # fmt: skip
    rows = [r for r in kept if r["case"] == f"tiny, {stage}, 32 x 256" and r["peer"] == "ours" and r["unit"] in units]
    assert len(rows) == len(units)
    for r in rows:
        assert now[units[r["unit"]]] <= 1.01 * r["median"], f"{r['unit']}: python bench/gpu_program.py steps, if it is meant"


def test_docs_benchmarks_is_what_the_results_give():
    text, charts = bench_report.page(BENCH / "results")
    docs = ROOT / "docs" / "benchmarks.md"
    assert docs.read_text(encoding="utf-8") == text, "run fastlm bench report"
    for name, svg in charts.items():
        assert (docs.with_suffix("") / name).read_text(encoding="utf-8") == svg, "run fastlm bench report"


def test_clipping_and_optimizers_cost_a_gpu_no_more_than_the_docs_say():
    """Counted for modern-253m; the same, wholly by hand, from the sizes of its matrices."""
    counted = optimizer_step.count(PRESETS["modern-253m"])
    clip, muon, adamw = (counted[name] for name in ("clip", "Muon", "AdamW"))
    assert [part.launches for part in counted.values()] == [2, 13, 2]
    hidden, others = 12 * (3 + 1 + 8 + 4) * 1024 * 1024, 50304 * 1024 + 25 * 1024
    squares = 48 * 1024 * 1024  # numbers in the Gram matrices, in fp16
    assert clip.traffic == pytest.approx(4 * (hidden + others), rel=1e-3)
    assert muon.traffic == pytest.approx((14 + 4 + 10) * hidden + 5 * 2 * 2 * squares, rel=1e-3)
    assert adamw.traffic == pytest.approx(28 * others, rel=1e-3)
    assert muon.matmuls == 30
    by_gram = 2 * 1024 * (2 * 2 * hidden + 14 * squares)  # twice X X^T and P X; A A, A P, (A P) P and P P beside them
    assert muon.flops == pytest.approx(by_gram, rel=1e-9)
    assert muon.ms < 6.7

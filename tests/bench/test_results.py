"""The benchmarks' machinery: what they write and compare, what the report makes of it, and the CPU's cases once, small."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from benchmarks import BENCH, ROOT, python, row

from fastlm import bench_report
from fastlm.cli import main
from fastlm.config import PRESETS

sys.path.insert(0, str(BENCH))

import optimizer_step
import results

SLEEPERS = """
import time

def test_sleepers(take_turns, measuring):
    take_turns(lambda: time.sleep(0.002), {"slow": lambda: time.sleep(SLOW), "copy": lambda: time.sleep(0.001)}, rounds=5)

def test_without_its_peer(record, benchmark):
    record(peer="liger", missing="liger-kernel is not installed")
"""


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

"""What the benchmarks write and compare, and the cases of the CPU once, small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.benchmarks import BENCH, ROOT, python, row

from bench.harness import results

SLEEPERS = """
import time

def test_sleepers(take_turns, measuring):
    rivals = {"slow": lambda: time.sleep(SLOW), "copy": lambda: time.sleep(0.01)}
    take_turns(lambda: time.sleep(0.02), rivals, rounds=5)

def test_without_its_peer(record, benchmark):
    record(peer="liger", missing="liger-kernel is not installed")
"""


@pytest.fixture
def bench(tmp_path) -> Path:
    """A benchmark folder of its own whose one contender sleeps twice as long as ours."""
    shutil.copy(BENCH / "conftest.py", tmp_path)
    (tmp_path / "test_sleepers.py").write_text(SLEEPERS.replace("SLOW", "0.04"), encoding="utf-8")
    return tmp_path


def test_a_row_is_replaced_by_a_later_one_of_the_same_case_and_contender():
    old = [row("ours", 1.0), row("liger", 2.0, 2.0), row("eager", 3.0, 3.0)]
    new = [
        row("ours", 1.5),
        {"group": "g", "case": "c", "peer": "liger", "failed": "out of memory"},
    ]
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
    assert (
        "out of memory"
        in results.falls(
            old, [{"group": "g", "case": "c", "peer": "peer", "failed": "out of memory"}]
        )[0]
    )
    assert not results.falls(
        old, [{"group": "g", "case": "c", "peer": "never", "failed": "out of memory"}]
    )


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
    options = "-m pytest -q . --benchmark --results again.json --compare old.json"
    doctored = python(*options.split(), cwd=bench)
    assert doctored.returncode == 1
    assert "old.json: 2 ratios compared" in doctored.stdout
    assert "slow, s: the ratio fell from 4.00" in doctored.stdout


def test_a_comparison_passes_on_honest_ratios_and_fails_where_there_are_none():
    old = [row("ours", 1.0), row("peer", 2.0, 2.0)]
    assert results.comparison(old, [row("peer", 2.0, 1.9)]) == (
        ["1 ratios compared, 0 of the file's ratios were not taken this time"],
        False,
    )
    assert results.comparison(old, [row("ours", 1.0)])[1]


def test_a_case_that_raises_and_one_that_was_not_reached_are_rows(bench):
    (bench / "test_sleepers.py").write_text(
        "def test_broken(benchmark):\n    benchmark(lambda: 1 / 0)\n", encoding="utf-8"
    )
    assert python("-m", "pytest", "-q", ".", "--results", "now.json", cwd=bench).returncode == 1
    rows = json.loads((bench / "now.json").read_text())["rows"]
    assert [r["failed"] for r in rows] == ["ZeroDivisionError: division by zero"]
    (bench / "test_skipped.py").write_text(
        "import pytest\npytest.importorskip('absent', reason='no peer')\n", encoding="utf-8"
    )
    assert (
        python(
            "-m", "pytest", "-q", ".", "--results", "late.json", "--seconds", "0", cwd=bench
        ).returncode
        == 0
    )
    rows = json.loads((bench / "late.json").read_text())["rows"]
    assert {r["group"]: r["missing"] for r in rows} == {
        "sleepers": "not run: 0 seconds were over",
        "skipped": "no peer",
    }


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


def test_a_contender_in_a_process_of_its_own_has_the_case_of_ours():
    ours = results.place("test_gpu_train", "test_gpu_step[ours]", "ours")
    assert ours == {"group": "gpu_train", "case": "step"}
    peer = "attention: torch, FlashAttention"
    assert results.place("test_gpu_train", f"test_gpu_step[{peer}]", peer) == ours
    assert results.place("test_gpu_tuning", "test_gpu_tuning[sft-ours]", "ours")["case"] == "sft"
    assert (
        results.place("test_gpu_gate", "test_gpu_gradients[packed]")["case"] == "gradients packed"
    )
    assert (
        results.place("test_gpu_kernels", "test_gpu_kernel[rope-4096x1024-both]")["case"]
        == "rope 4096x1024 both"
    )


def test_ratios_between_processes_are_of_medians_and_their_spread_is_the_widest():
    ours = row("ours", 2.0) | {"q10": 1.0, "q90": 4.0}
    peer = row("peer", 6.0) | {"q10": 5.0, "q90": 8.0}
    other = row("peer", 6.0, 7.0, case="other")
    found = results.with_ratios([ours, peer, other])
    assert found[1]["ratio"] == {"median": 3.0, "q10": 1.25, "q90": 8.0}
    assert found[2] == other
    faster = results.with_ratios([row("ours", 1.0), *found[1:]])
    assert faster[1]["ratio"]["median"] == 6.0, "made again where ours was measured again"

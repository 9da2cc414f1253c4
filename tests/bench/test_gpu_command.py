"""`make gpu`: its parts, its budget of time, its rows and its exit codes, on invented cases."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.benchmarks import BENCH, ROOT, python, row

from bench.harness import results
from bench.scripts import gpu


def test_every_gpu_benchmark_belongs_to_a_part():
    files = [file for group in gpu.PARTS.values() for file in group]
    assert sorted(files) == sorted(f"bench/{file.name}" for file in BENCH.glob("test_gpu_*.py"))


def case(peer: str, name: str = "step") -> dict[str, str]:
    test = f"bench/test_gpu_train.py::test_gpu_{name}[{peer}]"
    return {"name": test, "group": "gpu_train", "case": name, "peer": peer}


def measured(milliseconds: float) -> dict[str, Any]:
    return {
        "unit": "ms",
        "median": milliseconds,
        "q10": milliseconds,
        "q90": milliseconds,
        "rounds": 1,
    }


@pytest.fixture
def train(tmp_path, monkeypatch) -> Callable[..., tuple[int, dict[str, dict]]]:
    """Part train on invented cases.

    Answers by peer, each (exit code of its process, what its rows hold).
    """
    path, about = tmp_path / "gpu.json", results.machine()

    def call(
        answers: dict[str, tuple[int | None, list[dict]]], *arguments: str
    ) -> tuple[int, dict[str, dict]]:
        cases = [case(peer) for peer in answers]

        def run(options: list[str], seconds: float) -> tuple[int | None, str]:
            mine = next(one for one in cases if one["name"] == options[0])
            stamp = json.loads(options[options.index("--stamp") + 1])
            code, rows = answers[mine["peer"]]
            where = {key: mine[key] for key in ("group", "case", "peer")}
            results.save(path, about, [stamp | where | found for found in rows])
            return code, "its last words"

        monkeypatch.setattr(gpu, "run", run)
        monkeypatch.setattr(gpu, "collect", lambda part, file: cases)
        monkeypatch.setattr(
            gpu, "rehearsing", lambda: False
        )  # there, the cases of a file share a process
        monkeypatch.setattr(results, "machine", lambda: about)
        monkeypatch.setattr(
            sys, "argv", ["gpu.py", "--part", "train", "--results", str(path), *arguments]
        )
        code = gpu.main()
        return code, {found["peer"]: found for found in results.read(path)["rows"]}

    return call


def test_a_part_passes_where_all_of_ours_is_there_and_names_what_it_ran_on(train):
    code, rows = train({"ours": (0, [measured(2.0)]), "peer": (0, [measured(3.0)])})
    assert code == 0
    assert rows["peer"]["ratio"] == {"median": 1.5, "q10": 1.5, "q90": 1.5}
    for found in rows.values():
        assert found["command"] == "python -m bench.scripts.gpu --part train"
        assert found["torch"] == torch.__version__
        assert found["attention"].startswith("rows: ")
        assert {"device", "triton", "run", "part", "date"} <= set(found)


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (-11, "exit code -11, and no row: its last words"),
        (None, "did not end within"),
        (0, "exit code 0, and no row: its last words"),
    ],
)
def test_a_process_that_leaves_no_row_is_a_failure_of_its_contender_alone(train, exit_code, words):
    code, rows = train({"ours": (exit_code, []), "peer": (0, [measured(3.0)])})
    assert code == 1
    assert words in rows["ours"]["failed"]
    assert rows["peer"]["median"] == 3.0
    code, rows = train({"ours": (0, [measured(2.0)]), "peer": (exit_code, [])})
    assert code == 0, "a peer may be missing"
    assert words in rows["peer"]["failed"]
    assert rows["ours"]["median"] == 2.0


def test_a_crash_after_the_figures_of_ours_is_a_failure_and_keeps_them(train):
    code, rows = train({"ours": (-11, [measured(2.0)]), "peer": (-11, [measured(3.0)])})
    assert code == 1
    assert rows["ours"]["median"] == 2.0
    assert "exit code -11" in rows["case"]["failed"]
    assert rows["peer"]["median"] == 3.0


def test_what_the_time_did_not_reach_is_missing_and_only_ours_makes_the_exit_code(train):
    code, rows = train({"ours": (0, [measured(2.0)])}, "--seconds", "1")
    assert code == 1
    assert rows["ours"]["missing"] == "not run: 1 seconds were over"
    code, rows = train({"peer": (0, [measured(2.0)])}, "--seconds", "1")
    assert code == 0
    assert rows["peer"]["missing"] == "not run: 1 seconds were over"


def test_rows_of_an_earlier_call_neither_pass_nor_fail_a_later_one(train):
    assert train({"ours": (0, [{"failed": "out of memory"}])})[0] == 1
    code, rows = train({"ours AdamW": (0, [measured(2.0)])})
    assert code == 0
    assert rows["ours"]["failed"] == "out of memory"
    assert train({"ours": (0, [])})[0] == 1


def test_ours_must_be_there_and_peers_may_be_missing():
    assert all(results.ours({"peer": peer}) for peer in ("ours", "ours AdamW", "case"))
    assert not any(
        results.ours({"peer": peer})
        for peer in ("liger", "plain PyTorch compiled", "copy", "ourselves")
    )


def test_a_peer_that_fails_fails_a_rehearsal_alone(monkeypatch):
    rows = [
        {"peer": "liger", "failed": "a bug here"},
        {"peer": "trl", "missing": "not installed"},
        row("ours", 1.0),
    ]
    monkeypatch.setattr(gpu, "rehearsing", lambda: True)
    assert gpu.wrong_rows(rows) == rows[:1]
    monkeypatch.setattr(gpu, "rehearsing", lambda: False)
    assert not gpu.wrong_rows(rows)


def test_a_rehearsal_does_not_go_into_the_results_nor_another_device_into_a_file(tmp_path):
    about = {"device": "a GPU", "kind": "rehearsal"}
    assert "a rehearsal is no result" in gpu.unfit(results.FOLDER / "gpu.json", about)
    assert not gpu.unfit(tmp_path / "gpu.json", about)
    results.save(tmp_path / "gpu.json", {"device": "another GPU", "kind": "rehearsal"}, [])
    assert "holds results of another GPU (rehearsal)" in gpu.unfit(tmp_path / "gpu.json", about)
    done = python(
        "-m",
        "bench.scripts.gpu",
        "--part",
        "gate",
        "--results",
        results.FOLDER / "gpu.json",
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (results.FOLDER / "gpu.json").exists()

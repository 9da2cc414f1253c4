"""`make gpu` rehearsed without a GPU, small, and in a Python that has nothing but what it needs."""

from __future__ import annotations

import json
import os
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from helpers.benchmarks import ROOT, python
from packaging.requirements import Requirement

from bench.harness import tables

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


@pytest.mark.slow
def test_fastlm_s_own_loop_with_nothing_but_torch_triton_numpy_and_pytest(tmp_path):
    """Pretraining to its end, and SFT from it, in a Python without any other package."""
    out = tmp_path / "gpu.json"
    bare = bare_python(tmp_path / "bare")
    done = python(
        "-m",
        "bench.scripts.gpu",
        "--part",
        "train",
        "--only",
        "[ours]",
        "--results",
        out,
        cwd=ROOT,
        executable=bare,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["kind"] == "rehearsal"
    rows = {found["peer"]: found for found in found["rows"]}
    assert rows["ours"]["median"] > 0
    assert rows["ours"]["stand_ins"] == ["rich", "safetensors"]
    steps = [step for step, _ in rows["ours"]["loss"]]
    assert steps == [6]
    assert rows["ours"]["validation_loss"] > 0
    assert rows["Hugging Face Llama compiled"]["missing"] == "transformers is not installed"
    assert rows["attention flash"]["missing"] == "flash needs a GPU"
    tuning = (
        "-m",
        "bench.scripts.gpu",
        "--part",
        "tuning",
        "--only",
        "[sft-plain",
        "--results",
        out,
    )
    done = python(*tuning, cwd=ROOT, executable=bare)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_and_their_tests_rehearsed(tmp_path):
    out = tmp_path / "gpu.json"
    for part, only in (("kernels", "swiglu-4096x4096-both"), ("tests", "test_swiglu")):
        done = python(
            "-m", "bench.scripts.gpu", "--part", part, "--only", only, "--results", out, cwd=ROOT
        )
        assert done.returncode == 0, done.stdout + done.stderr
    rows = {(found["case"], found["peer"]): found for found in json.loads(out.read_text())["rows"]}
    assert rows["swiglu 4096x4096 both", "inductor"]["ratio"]["median"] > 0
    assert rows["swiglu 4096x4096 both", "ours"]["measures"]["gb"] == 2 * 3 * 128 * 8 / 1e9
    assert rows["swiglu 4096x4096 both", "copy"]["measures"]["share_of_copy"] == 1
    tests = rows["test_swiglu.py", "ours"]["measures"]
    assert tests["failed"] == 0
    assert tests["passed"] >= 30
    assert f"tests: {tests['passed']:.0f} passed, 0 failed" in done.stdout


BROKEN = """
import bench.peers.gpu as peers_gpu

def broken(op, given):
    raise RuntimeError("no such kernel image")
peers_gpu.liger, peers_gpu.absent = broken, lambda package, module: ""
"""


def test_a_contender_that_fails_is_recorded_and_the_others_are_measured(tmp_path):
    (tmp_path / "with_a_broken_peer.py").write_text(BROKEN, encoding="utf-8")
    out = tmp_path / "now.json"
    options = "-m pytest -q -p with_a_broken_peer bench/test_gpu_kernels.py"
    done = python(
        *options.split(),
        "-k",
        "swiglu-4096x4096-both",
        "--results",
        out,
        cwd=ROOT,
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
    )
    assert done.returncode == 0, done.stdout
    rows = {r["peer"]: r for r in json.loads(out.read_text())["rows"]}
    assert rows["liger"]["failed"] == "RuntimeError: no such kernel image"
    assert {peer for peer, r in rows.items() if "median" in r} == {
        "ours",
        "eager",
        "inductor",
        "copy",
    }
    assert "FAILED swiglu 4096x4096 both, liger: RuntimeError" in tables.short_table(
        list(rows.values())
    )

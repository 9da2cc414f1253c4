"""What a wheel holds, with and without a C++ compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from fastlm import __version__

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.so", "build", "dist", "runs", "tests", "bench", "docs", "*.egg-info"
)
NO_COMPILER = {"CC": "/no/such/compiler", "CXX": "/no/such/compiler"}

pytestmark = pytest.mark.slow


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel of this source tree, built as pip builds it."""
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCE)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    command = [*pip, "--wheel-dir", str(folder), str(source)]
    if all(importlib.util.find_spec(name) for name in ("scikit_build_core", "nanobind")):
        command.append("--no-build-isolation")
    subprocess.run(
        command, check=True, env=os.environ | environment, capture_output=True, timeout=600
    )
    return next(folder.glob("fastlm-*.whl"))


def top_level_names(wheel: Path) -> set[str]:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    return {name for name in names if not name.endswith(".dist-info")}


def run_installed(wheel: Path, code: str) -> str:
    """What the code prints in a Python that sees the unpacked wheel instead of this source tree."""
    site = wheel.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # -S leaves out .pth files, and with them an editable install of this tree, which would come
    # first
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        )
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=site,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NORM = """
import torch, fastlm, fastlm.kernels
from fastlm.kernels import native, rms_norm
x = torch.randn(4, 32, requires_grad=True)
y = rms_norm(x, torch.ones(32), 1e-6)
y.sum().backward()
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (32,), eps=1e-6))
print(fastlm.__file__, native.status(), sep="\\n")
"""


def test_version_is_the_same_wherever_it_stands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_wheel_holds_one_package_with_the_native_module_inside(tmp_path):
    wheel = build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert top_level_names(wheel) == {"fastlm"}
    assert [n for n in names if n.endswith(".so")] == [
        n for n in names if n.startswith("fastlm/kernels/_native.")
    ]
    assert not any(n.endswith((".cpp", ".hpp")) for n in names)
    assert "fastlm/py.typed" in names
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    for folder in (
        "kernels",
        "train",
    ):  # symbolic links in the source tree, real folders in the wheel
        sources = {
            f"fastlm/{folder}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*.py")
        }
        sources |= {
            f"fastlm/{folder}/{p.relative_to(ROOT / folder)}"
            for p in (ROOT / folder).rglob("*.toml")
        }
        assert sources
        assert sources <= set(names)
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip(
            "no C++ compiler on this machine: the wheel is rightly without the native module"
        )
    assert any(n.endswith(".so") for n in names)
    where, status = run_installed(wheel, NORM).splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert status.startswith("native")


def test_without_a_compiler_the_wheel_is_pure_and_uses_the_reference(tmp_path):
    wheel = build_wheel(tmp_path, **NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert top_level_names(wheel) == {"fastlm"}
    where, status = run_installed(wheel, NORM).splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert status.startswith("PyTorch reference path")

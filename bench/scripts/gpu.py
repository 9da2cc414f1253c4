"""`make gpu`: everything that a rented GPU is to settle, in five parts of at most 9 minutes each.

    python -m bench.scripts.gpu [--part gate|train|kernels|tuning|tests] [--results FILE]
                                [--seconds 540] [--only WORDS]

gate      what this GPU reaches; gradients against fp32; no waits and no late compilation in a step
train     fastlm's own pretraining of modern-253m for 300 steps, by kind of kernel; A/B of 30 steps
kernels   every operation and the head's loss against PyTorch, Inductor, Liger-Kernel and a copy
tuning    SFT, DPO, evaluation and writing
tests     the kernels' tests, without those that need no GPU

Without --part all five run, one after the other, each in its own --seconds. Needed: torch, triton,
numpy, pytest and pytest-benchmark. fastlm is read from this folder, not installed; rich and
safetensors, which its training loop imports, have stand-ins where they are missing
(bench/harness/stand_ins.py). A peer that is not installed is a row that says so.

Each contender runs in a process of its own: what crashes the GPU's context or does not end loses
its own figures only. Results are written after every case, and a later call with the same --results
adds to them. What the time did not reach is a row "missing: not run". --only: cases whose name in
pytest has these words.

Exit code 1 where a row of ours is missing or failed, 2 where the file is not for these results.

Without a GPU, or on the stand-in for one that computes nothing, it is a rehearsal: the same lines,
small, with an exit code of 1 where a peer failed too. It never writes into bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import results
from bench.harness.gpu_timing import rehearsing
from bench.harness.tables import short_table
from fastlm.attention_backend import choose
from fastlm.config import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "gate": ("bench/test_gpu_gate.py",),
    "train": ("bench/test_gpu_train.py",),
    "kernels": ("bench/test_gpu_kernels.py", "bench/test_gpu_head.py"),
    "tuning": ("bench/test_gpu_tuning.py",),
    "tests": (),  # of tests/kernels, below
}
NEED_NO_GPU = ("test_compiled.py", "test_native.py", "test_traffic.py")
REHEARSED_TESTS = ("test_swiglu.py",)
SHARE = 0.5  # of the time that is left, for one process; the last one may have all of it
LEAST = 20.0  # seconds; with fewer left a process is not begun
GRACE = 15.0  # seconds that a process has to end the case it is in
PYTEST_OPTIONS = ("-q", "--tb=short", "-p", "no:cacheprovider", "--benchmark-quiet")

Case = dict[str, str]  # name in pytest, group, case, peer


@dataclass
class Part:
    """One part: where its rows go, what each of them gets, and until when it may run."""

    name: str
    path: Path
    about: dict[str, Any]
    stamp: dict[str, Any]
    seconds: float
    ends: float

    def left(self) -> float:
        return self.ends - time.monotonic()

    def save(self, row: dict[str, Any]) -> None:
        """Keep a row of this part's own, and say it."""
        results.save(self.path, self.about, [self.stamp | row])
        print(f"{row['case']}: {results.line(row)}", flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """What this run of the part has written so far."""
        kept = results.read(self.path)["rows"] if self.path.is_file() else []
        return [row for row in kept if row.get("run") == self.stamp["run"]]


def attention_words() -> str:
    """Which attention fastlm takes on this machine in bf16, and why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return str(choose("auto", device, torch.bfloat16, PRESETS["modern-253m"]))


def begin(name: str, path: Path, about: dict[str, Any], seconds: float) -> Part:
    stamp = {
        "part": name,
        "run": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
        "device": about["device"],
        "attention": attention_words(),
        "torch": about["versions"]["torch"],
        "triton": about["versions"].get("triton", "none"),
        "command": f"python -m bench.scripts.gpu --part {name}",
        "date": about["date"],
    }
    return Part(name, path, about, stamp, seconds, time.monotonic() + seconds)


# ---------------------------------------------------------------- processes


def run(arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """(exit code, output) of pytest in a process of its own; None: ended after so many seconds."""
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-m", "pytest", *PYTEST_OPTIONS, *arguments]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipe) as process:
        try:
            output = process.communicate(timeout=max(seconds, 1))[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        return process.returncode, output


def last_words(output: str) -> str:
    return " ".join(output.split())[-250:]


def collect(part: Part, file: str) -> list[Case]:
    """The file's cases, in order: each with its name in pytest, group, case and peer."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "cases.json"
        options = ["--collect-only", file, "--cases", str(listed)]
        code, output = run(options, max(part.left(), LEAST))
        if code == 0 and listed.is_file():
            return json.loads(listed.read_text(encoding="utf-8"))
    group = Path(file).stem.removeprefix("test_")
    why = f"its cases cannot be collected: {last_words(output)}"
    part.save({"group": group, "case": "all", "peer": "case", "failed": why})
    return []


def processes(part: Part, only: str) -> list[list[Case]]:
    """The cases by process: each has its own; those of one kernel share one.

    In a rehearsal all cases of a file share one, which saves most of its time.
    """
    found = [case for file in PARTS[part.name] for case in collect(part, file)]
    cases = [case for case in found if only in case["name"]]

    def process(case: Case) -> str:
        name = case["name"]
        if rehearsing():
            return name.split("::")[0]
        return name.split("-")[0] if "test_gpu_kernels.py" in name else name

    return [list(together) for _, together in itertools.groupby(cases, process)]


def measure(part: Part, only: str) -> None:
    """Run the part's cases; one that did not run, or crashed, has a row that says so."""
    waiting = processes(part, only)
    for number, cases in enumerate(waiting):
        last = number == len(waiting) - 1
        seconds = part.left() if last else SHARE * part.left()
        code: int | None = 0
        why = {"missing": f"not run: {part.seconds:g} seconds were over"}
        if seconds >= LEAST:
            options = ["--seconds", f"{seconds - GRACE:.0f}", "--results", str(part.path)]
            options += ["--stamp", json.dumps(part.stamp)]
            options += [] if rehearsing() else ["--benchmark"]
            code, output = run([*(case["name"] for case in cases), *options], seconds)
            print(output, flush=True)
            if code is None:
                why = {"failed": f"did not end within {seconds:.0f} s"}
            else:
                why = {"failed": f"exit code {code}, and no row: {last_words(output)}"}
        ended = code in (0, 1)  # 1: a case failed, and its row says so
        for case in without_row(cases, part.rows(), ended):
            part.save(case | why)
        rows = results.with_ratios(results.read(part.path)["rows"])
        results.save(part.path, part.about, rows)


def without_row(cases: list[Case], rows: list[dict[str, Any]], ended: bool) -> list[Case]:
    """The cases that have left no row; or the last one, if it is ours and its process crashed."""
    keys = ("group", "case", "peer")
    wanted = [{key: case[key] for key in keys} for case in cases]
    kept = set()
    for row in rows:
        found = {key: row[key] for key in keys} | {"case": row["case"].split(" / ")[0]}
        kept |= {tuple(found.values()), tuple((found | {"peer": "case"}).values())}
    lacking = [case for case in wanted if tuple(case.values()) not in kept]
    if ended or lacking or not results.ours(wanted[-1]):
        return lacking
    return [wanted[-1] | {"peer": "case"}]


# ---------------------------------------------------------------- the kernels' tests


def tested(file: Path, part: Part) -> dict[str, Any]:
    """A row for one file of the kernels' tests: how many passed, failed and were skipped."""
    row: dict[str, Any] = {"group": "correctness", "case": file.name, "peer": "ours"}
    seconds = part.left()
    if seconds < LEAST:
        return row | {"missing": f"not run: {part.seconds:g} seconds were over"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code, output = run([str(file), f"--junitxml={report}"], seconds)
        if code is None:
            return row | {"failed": f"did not end within {seconds:.0f} s"}
        if not report.is_file():
            return row | {"failed": last_words(output) or f"exit code {code}"}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    names = ("tests", "failures", "errors", "skipped")
    count = {name: int(suite.get(name, 0)) for name in names}
    bad = count["failures"] + count["errors"]
    row["measures"] = {
        "passed": count["tests"] - bad - count["skipped"],
        "failed": bad,
        "skipped": count["skipped"],
        "seconds": float(suite.get("time", 0)),
    }
    if bad and hasattr(torch, "fakegpu_counts"):
        row["note"] = "not checked: rehearsal, the stand-in for a GPU computes nothing"
    elif bad:
        broken = [case.get("name", "") for case in suite.iter("testcase") if failed(case)]
        row["failed"] = f"{bad} tests: {', '.join(broken)}"[:300]
    return row


def failed(case: ElementTree.Element) -> bool:
    return bool({part.tag for part in case} & {"failure", "error"})


def run_tests(part: Part, only: str) -> None:
    """The kernels' tests, a file a process, several at a time: Triton's compiler takes the most."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    files = [file for file in files if only in file.name and file.name not in NEED_NO_GPU]
    if rehearsing():
        files = [file for file in files if file.name in REHEARSED_TESTS]
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        for job in [pool.submit(tested, file, part) for file in files]:
            part.save(job.result())


# ---------------------------------------------------------------- the command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="one part (default: all in a row)")
    default = "bench/results/<device>-<date>.json"
    parser.add_argument("--results", help=f"where the results go (default: {default})")
    parser.add_argument("--seconds", type=float, default=540, help="that a part may take")
    parser.add_argument("--only", default="", help="cases whose name in pytest has these words")
    args = parser.parse_args()
    about = results.machine() | ({"kind": "rehearsal"} if rehearsing() else {})
    path = Path(args.results).resolve() if args.results else results.default_path(about)
    if problem := unfit(path, about):
        print(f"gpu.py: {problem}; name another file with --results", file=sys.stderr)
        return 2
    if rehearsing():
        print("A rehearsal: no GPU here computes. The lines run, small; figures mean nothing.")
    facts = about["hardware"] | about["versions"] | {"attention": attention_words()}
    words = ", ".join(f"{key} {value}" for key, value in facts.items())
    print(f"{about['device']}: {words}", flush=True)
    bad = 0
    for name in [args.part] if args.part else PARTS:
        part = begin(name, path, about, args.seconds)
        (run_tests if name == "tests" else measure)(part, args.only)
        rows = part.rows()
        wrong = wrong_rows(rows)
        took = f"{args.seconds - part.left():.0f} s"
        print(short_table(rows))
        summary = f"{len(rows)} rows, {len(wrong)} wrongly missing or failed"
        print(f"\n{name}: {took}, {summary}; {path}")
        bad += len(wrong) + (not rows and not args.only)
    return int(bad > 0)


def wrong_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ours that are missing or failed; in a rehearsal a peer that failed too."""
    found = [row for row in rows if results.ours(row) and ("missing" in row or "failed" in row)]
    if rehearsing():
        found += [row for row in rows if not results.ours(row) and "failed" in row]
    return found


def unfit(path: Path, about: dict[str, Any]) -> str:
    """Why these results must not go into the file; empty where they may."""
    if rehearsing() and path.is_relative_to(results.FOLDER):
        return f"a rehearsal is no result and does not go into {results.FOLDER}"
    held = results.read(path) if path.is_file() else about
    both = [f"{found['device']} ({found['kind']})" for found in (held, about)]
    return "" if both[0] == both[1] else f"{path} holds results of {both[0]}, this is {both[1]}"


if __name__ == "__main__":
    sys.exit(main())

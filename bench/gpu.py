"""`make gpu`: the kernels' tests, then every GPU benchmark, then a short table; unattended, within 9 minutes on one H100.

    python bench/gpu.py [--results FILE] [--seconds 540] [--tests FILES] [--only WORDS]

It needs torch, triton, numpy, pytest and pytest-benchmark; fastlm is read from this folder, not installed. Every part runs in
a process of its own, in a share of the time that is left: one that crashes the GPU's context or does not end loses its own
figures only. Results are written after every case. Without a GPU it is a rehearsal: the same lines, small, interpreted.
Exit code 1 when a test or a case failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import results  # noqa: E402

from fastlm.bench_report import short_table  # noqa: E402

# name -> (file, which of its cases, share of the time that is left); what one does not use, the next ones have
PARTS = {
    "pretraining step": ("bench/test_gpu_training.py", "pretrain", 0.5),
    "kernels": ("bench/test_gpu_kernels.py", "kernel", 0.6),
    "head": ("bench/test_gpu_head.py", "head", 0.5),
    "SFT and DPO steps": ("bench/test_gpu_training.py", "sft or dpo", 1.0),
}
TEST_SHARE = 0.4
GRACE = 15  # seconds beyond its share that a part has to end the case it is in


def run(arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """(exit code, output) of pytest in a process of its own; None where it was ended after so many seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipe) as process:
        try:
            output = process.communicate(timeout=max(seconds, 1))[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        return process.returncode, output


def tested(file: str, seconds: float) -> dict:
    """A row for one file of the kernels' tests: how many passed, failed and were skipped, or that it did not end."""
    where = {"group": "correctness", "case": Path(file).name, "peer": "ours"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code, output = run([file, f"--junitxml={report}"], seconds)
        if code is None:
            return where | {"failed": f"did not end within {seconds:.0f} s"}
        if not report.is_file():
            return where | {"failed": " ".join(output.split())[-300:] or f"exit code {code}"}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = count["failures"] + count["errors"]
    broken = [case.get("name", "") for case in suite.iter("testcase") if {part.tag for part in case} & {"failure", "error"}]
    row = where | {"measures": {
        "passed": count["tests"] - bad - count["skipped"], "failed": bad, "skipped": count["skipped"],
        "seconds": float(suite.get("time", 0))
    }}  # fmt: skip
    return row | {"failed": f"{bad} tests: {', '.join(broken)}"[:300]} if bad else row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", help="where the results go (default: bench/results/<device>-<date>.json)")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--tests", nargs="*", help="test files (default: all of tests/kernels)")
    parser.add_argument("--only", default="", help="pytest -k for the benchmarks")
    args = parser.parse_args()
    gpu, ends = torch.cuda.is_available(), time.monotonic() + args.seconds
    about = results.machine() | ({} if gpu else {"kind": "rehearsal"})
    default = results.default_path(about) if gpu else ROOT / "build" / "rehearsal.json"
    path = Path(args.results).resolve() if args.results else default
    if not gpu:
        path.unlink(missing_ok=True)
        print("No GPU here: a rehearsal. Every line runs, small, in Triton's interpreter; its times mean nothing.")
    shown = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    stamp = {"command": "make gpu", "date": about["date"]}

    def left() -> float:
        return ends - time.monotonic()

    files = args.tests or [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))]
    limit = TEST_SHARE * left()
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        begun = time.monotonic()
        jobs = [pool.submit(lambda file=file: tested(file, limit - (time.monotonic() - begun))) for file in files]
        for job in jobs:
            row = job.result() | stamp
            results.save(path, about, [row])
            print(f"{row['case']}: {results.line(row)}", flush=True)
    for name, (file, words, share) in PARTS.items():
        seconds = share * left() - GRACE
        chosen = f"({words}) and ({args.only})" if args.only else words
        options = ["-k", chosen, "--seconds", f"{seconds:.0f}", "--results", shown, *(["--benchmark"] if gpu else [])]
        code, output = run([file, *options], seconds + GRACE)
        print(output, flush=True)
        if code is None or code not in (0, 1, 5):  # 1: cases failed, each noted as a row; 5: --only left none
            why = "did not end in its time" if code is None else f"exit code {code}: {' '.join(output.split())[-250:]}"
            results.save(path, about, [stamp | {"group": "make gpu", "case": name, "peer": "ours", "failed": why}])
    rows = results.read(path)["rows"]
    print(short_table(rows))
    print(f"\n{shown}: {len(rows)} rows, {sum('failed' in row for row in rows)} failed; {args.seconds - left():.0f} s")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

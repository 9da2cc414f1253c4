"""Nothing is compiled after the first step of any stage, and no later step waits for the GPU.

    fakegpu PYTHON tests/gpuless/recompiles.py

Trains every stage for 50 steps on the stand-in GPU, compiled, on documents and examples of all
lengths, so that the number of documents in a batch changes from step to step. Prints a line for
each stage, and ends with 1 where a step but the first compiled a graph, or one after those in
which CUDA graphs are recorded waited for the device.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fastlm.cli import main as fastlm  # noqa: E402
from fastlm.monitor import Monitor  # noqa: E402

STEPS = 50
RECORDED = 5  # steps until a small model's CUDA graphs are all recorded, which waits
COMMON = f"--device cuda --compile --steps {STEPS} --validate-every 0 --checkpoint-every 0"
ROWS = f"pretrain {COMMON} --preset tiny --seq-len 128 --batch-rows 4 --data {{text}}"
TUNED = f"{COMMON} --max-len 128 --batch-rows 4"
STAGES = {
    "pretrain": f"{ROWS} --out {{runs}}/pretrain",
    "pretrain, isolated": f"{ROWS} --isolate-documents --out {{runs}}/isolated",
    "pretrain, isolated, accumulated": f"{ROWS} --isolate-documents --micro-batch-rows 2",
    "sft": f"sft {{runs}}/pretrain {TUNED} --data {{instructions}}",
    "dpo": f"dpo {{runs}}/pretrain {TUNED} --data {{pairs}}",
    "dpo, prompts apart": f"dpo {{runs}}/pretrain {TUNED} --data {{pairs}} --no-share-prompt",
}

WORDS = ("red", "green", "blue", "one", "two", "three")


def write_data(folder: Path) -> dict[str, Path]:
    """Documents, instructions and pairs of 1 to 40 words, a JSON object a line."""
    rng = random.Random(0)

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))

    rows = {
        "text": [{"text": words()} for _ in range(3000)],
        "instructions": [{"instruction": words(), "output": words()} for _ in range(600)],
        "pairs": [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(400)],
    }
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
    return files


def run(command: list[str]) -> list[tuple[int, int]]:
    """Of each step of a command: the graphs compiled, and the waits for the device, until then."""
    found: list[tuple[int, int]] = []
    step = Monitor.step

    def noting(*args: Any, **options: Any) -> None:
        counts = torch.fakegpu_counts()  # type: ignore[attr-defined]
        waits = counts["stream syncs"] + counts["device syncs"]
        found.append((counters["stats"]["unique_graphs"], waits))
        step(*args, **options)

    with mock.patch.object(Monitor, "step", noting):
        code = fastlm(command)
    assert code == 0, f"fastlm {' '.join(command)} ended with {code}"
    assert len(found) == STEPS
    return found


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = {"runs": folder / "runs", **write_data(folder)}
        for stage, words in STAGES.items():
            command = [word.format(**places) for word in words.split()]
            if "--out" not in command:
                command += ["--out", str(folder / "runs" / stage.replace(" ", ""))]
            steps = run([*command, "--cache", str(folder / "cache")])
            recompiles = steps[-1][0] - steps[0][0]
            waits = steps[-1][1] - steps[RECORDED - 1][1]
            failed += bool(recompiles or waits)
            print(
                f"{stage}: {recompiles} graphs compiled after the first step, {waits} waits later"
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

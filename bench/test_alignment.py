"""SFT and DPO of a 16M-parameter model against TRL's trainers: speed and memory.

dim 256, 4 layers, vocabulary 50,257, length 512, fp32; each run in a process of its own, in turns.
The data are Code Alpaca and AlpacaEval's pairs from the folder shared/data beside the project. The
targets: five times the speed, a quarter of the memory.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
FILES = {"sft": "code_alpaca_2k.jsonl", "dpo": "alpaca_eval_pairs.jsonl"}
FASTER, SMALLER, ROUNDS = 5.0, 4.0, {"sft": 2, "dpo": 1}
LIMIT_S = 300  # of one run


def small_data(stage: str, folder: Path) -> Path:
    """A few rows of either kind, where nothing is measured."""
    row = {"instruction": "Count.", "input": "", "output": "one two"}
    if stage == "dpo":
        row = {"prompt": "Count:", "chosen": " one two", "rejected": " two"}
    file = folder / FILES[stage]
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(60)), encoding="utf-8")
    return file


def run(name: str, model: Path, data: Path) -> dict:
    command = [sys.executable, "-m", "bench.peers.alignment", name, str(model), str(data), "full"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_alignment(stage, measuring, record, benchmark, tmp_path):
    """SFT in real tokens per second, DPO in pairs per second with its reference pass; memory."""
    from bench.peers.alignment import make_model, turn

    model = make_model(tmp_path / "model", "full" if measuring else "small")
    if (
        not measuring
    ):  # TRL's own part is left out: its imports alone take longer than a smoke test may
        said = benchmark.pedantic(
            turn, (f"ours {stage}", model, small_data(stage, tmp_path), "small")
        )
        assert said["per_second"]
        assert min(said["per_second"]) > 0
        return
    data = DATA / FILES[stage]
    if not data.is_file():
        pytest.skip(f"no {FILES[stage]} in shared/data beside the project")
    names = ["ours", "trl"] if importlib.util.find_spec("trl") else ["ours"]
    turns: dict[str, list[dict]] = {name: [] for name in names}
    for round_ in range(ROUNDS[stage]):
        for name in names:
            arguments = (f"{name} {stage}", model, data)
            first = name == "ours" and round_ == 0
            turns[name].append(benchmark.pedantic(run, arguments) if first else run(*arguments))
    speed = {
        name: [statistics.median(t["per_second"]) for t in said] for name, said in turns.items()
    }
    memory = {name: [max(t["peak_gib"] for t in said)] for name, said in turns.items()}
    unit, many, what = (
        ("tokens_per_second", 1000, "1,000 real tokens")
        if stage == "sft"
        else ("pairs_per_second", 1, "a pair")
    )
    record(
        {name: [many / v for v in values] for name, values in speed.items()},
        case=what,
        measures={name: {unit: statistics.median(values)} for name, values in speed.items()},
    )
    record(memory, unit="peak GiB", case="memory")
    if "trl" not in names:
        record(peer="trl", missing="trl is not installed")
        pytest.skip("trl, the peer of this case, is not installed")
    faster = statistics.median(u / t for u, t in zip(speed["ours"], speed["trl"], strict=True))
    smaller = memory["trl"][0] / memory["ours"][0]
    assert faster >= FASTER and smaller >= SMALLER, (  # noqa: PT018 (one line that has both figures)
        f"{stage}: {faster:.2f} times TRL's speed (target {FASTER:g}), "
        f"a {smaller:.2f}th of its memory (target {SMALLER:g})"
    )

"""kill -9 at random moments: the group ends at once, torchrun starts it again, and the run ends as
if nothing had been.

python tests/train/kills.py 20 [ddp|fsdp]      so many kills, one at a time, at moments of a run
spread by a fixed seed
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastlm import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0  # in which the group must have ended and begun again


def torchrun(options: list[str], restarts: int, log: Path) -> subprocess.Popen[bytes]:
    """A pretraining run in two processes that torchrun starts again up to `restarts` times."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        str(restarts),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as stream:
        command = [sys.executable, *launcher, "-m", "fastlm", "pretrain", *options]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=stream, stderr=stream)


def workers(agent: int) -> list[int]:
    """The training processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    model = checkpoint.load_model(checkpoint.locate(run), torch.device("cpu"))[0]
    return {name: p.detach() for name, p in model.named_parameters()}


def kill_at_random(
    options: list[str], run: Path, kills: int, log: Path, seed: int = 0
) -> list[float]:
    """The run to its end, a process killed `kills` times.

    Returns the seconds from each kill to the next processes.
    """
    moments = random.Random(seed)
    process = torchrun([*options, "--out", str(run)], kills, log)
    took = []
    try:
        for _ in range(kills):
            alive = wait_for(lambda: len(workers(process.pid)) == 2 and workers(process.pid))
            wait_for(lambda: steps_done(run) > 0)
            time.sleep(moments.uniform(0, 4))
            if process.poll() is not None:
                raise AssertionError(f"the run ended before all kills: {log.read_text()}")
            os.kill(moments.choice(alive), signal.SIGKILL)
            begun = time.monotonic()
            wait_for(
                lambda alive=alive: (
                    len(workers(process.pid)) == 2 and not set(workers(process.pid)) & set(alive)
                ),
                SECONDS,
            )
            took.append(time.monotonic() - begun)
        assert process.wait(timeout=600) == 0, log.read_text()
    finally:
        process.terminate()
    return took


def wait_for(condition, seconds: float = 120.0):
    """What the condition gives as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)
    return found


if __name__ == "__main__":
    count, way = int(sys.argv[1]), (sys.argv[2:] or ["fsdp"])[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = [
            "--preset",
            "tiny",
            "--batch-rows",
            "4",
            "--seq-len",
            "32",
            "--steps",
            f"{100 + 30 * count}",
            "--validate-every",
            "0",
            "--checkpoint-every",
            "5",
            "--parallel",
            way,
            "--device",
            "cpu",
        ]
        assert (
            torchrun([*options, "--out", str(folder / "undisturbed")], 0, folder / "log").wait()
            == 0
        )
        took = kill_at_random(options, folder / "killed", count, folder / "log")
        told = (folder / "log").read_text().count("fastlm: ")
        a, b = weights(folder / "undisturbed"), weights(folder / "killed")
        assert all(torch.equal(a[name], b[name]) for name in a)
        print(
            f"{count} kills: begun again within {max(took):.1f} s, {told} lines of ours, the same "
            "weights"
        )

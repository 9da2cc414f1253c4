"""Cost per token and memory on this CPU as sequence, batch, vocabulary and model grow.

    python -m bench.scripts.cpu_scale

About 5 minutes on two slow cores, unattended. Every point runs in a process of its own (its peak
memory is its own): a warm-up step, then steps of forward, backward, clipping and AdamW in fp32,
eager, each beside a matmul that gives the machine's rate at that moment. The row "matmul" is what
the step's FLOPs alone would take at that rate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.harness import results
from bench.peers.contenders import training_step
from fastlm.config import ModelConfig, OptimConfig
from fastlm.kernels.native import keep_large_blocks
from fastlm.model import build, count_parameters, training_flops_per_token
from fastlm.runtime import process_peak_gib
from fastlm.train.optim import make_optimizers

MATMUL = 1024
SECONDS = 3.0


@dataclass(frozen=True)
class Point:
    dim: int = 256
    n_layers: int = 4
    vocab_size: int = 8192
    rows: int = 8
    seq_len: int = 256

    @property
    def config(self) -> ModelConfig:
        heads = max(1, self.dim // 64)
        return ModelConfig(
            vocab_size=self.vocab_size,
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=heads,
            n_kv_heads=heads,
            ffn_dim=3 * self.dim,
            max_seq_len=self.seq_len,
        )


def points() -> list[tuple[str, float, Point]]:
    """(axis, place on it, what to measure)."""
    models = [
        Point(dim=d, n_layers=n) for d, n in ((64, 2), (128, 4), (256, 4), (384, 6), (512, 8))
    ]
    return [
        *(
            ("sequence length", n, Point(rows=4096 // n, seq_len=n))
            for n in (128, 256, 512, 1024, 2048, 4096)
        ),
        *(("batch rows", n, Point(rows=n)) for n in (1, 2, 4, 8, 16)),
        *(("vocabulary", n, Point(vocab_size=n)) for n in (1024, 8192, 50257, 131072)),
        *(("million parameters", round(count_parameters(p.config) / 1e6, 1), p) for p in models),
    ]


def run(p: Point, seconds: float) -> dict:
    """Seconds of each step and of its FLOPs at the rate measured beside it; peak memory."""
    keep_large_blocks()
    model = build(p.config, 0, torch.device("cpu"))
    tokens = torch.randint(
        p.vocab_size, (2, p.rows, p.seq_len), generator=torch.Generator().manual_seed(0)
    )
    (adamw,) = make_optimizers(model, OptimConfig(name="adamw"))
    step = training_step(model, adamw, lambda: model.loss(tokens[0], tokens[1]) / tokens[0].numel())
    a, b = torch.randn(2, MATMUL, MATMUL)
    out = torch.empty_like(a)
    flops = training_flops_per_token(p.config, p.seq_len) * p.rows * p.seq_len
    found: dict[str, list[float]] = {"ours": [], "matmul": []}
    step()
    torch.mm(a, b, out=out)
    ends = time.perf_counter() + seconds
    while len(found["ours"]) < 2 or time.perf_counter() < ends:
        times = [time.perf_counter()]
        for turn in (lambda: torch.mm(a, b, out=out), step):
            turn()
            times.append(time.perf_counter())
        found["matmul"].append((times[1] - times[0]) * flops / (2 * MATMUL**3))
        found["ours"].append(times[2] - times[1])
    return {"seconds": found, "peak_gib": process_peak_gib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--point", help="measure one point here and print JSON (used by the command itself)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="of steps for each point, after one to warm up",
    )
    parser.add_argument("--only", default="", help="axes whose name contains this")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(run(Point(**json.loads(args.point)), args.seconds)))
        return
    about = results.machine()
    path = args.results or results.default_path(about)
    known: dict[Point, dict] = {}
    for axis, at, point in points():
        if args.only not in axis:
            continue
        if point not in known:
            command = [
                sys.executable,
                "-m",
                "bench.scripts.cpu_scale",
                "--point",
                json.dumps(asdict(point)),
                "--seconds",
                str(args.seconds),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            known[point] = json.loads(done.stdout)
        found, tokens = known[point], point.rows * point.seq_len
        us = {peer: [1e6 * s / tokens for s in series] for peer, series in found["seconds"].items()}
        rows = results.timed_rows("scale", f"{axis} {at:,}", "us a token", us)
        rows[0]["measures"] = {
            "peak_gib": found["peak_gib"],
            "tokens_per_second": 1e6 / rows[0]["median"],
        }
        stamp = {
            "axis": axis,
            "at": at,
            "command": "python -m bench.scripts.cpu_scale",
            "date": about["date"],
        }
        results.save(path, about, [row | stamp for row in rows])
        for row in rows:
            print(f"{row['case']}: {results.line(row)}", flush=True)


if __name__ == "__main__":
    main()

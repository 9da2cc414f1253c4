"""What the compiled GPU programs cost, counted without a GPU, into bench/results.

    python -m bench.counted.gpu_program [steps] [kernels] [scale] [trainer]
                                        [--only WORDS] [--results FILE]

steps    the pretrain, SFT and DPO step of three models, beside the same models in plain PyTorch
         under torch.compile (compiled_step.py)
kernels  the kernels' PTX executed in a simulator, beside Liger-Kernel's where it is installed
         (simulated_kernels.py)
scale    the pretrain step of modern-253m as batch, sequence length, vocabulary and model grow
trainer  the whole step of fastlm pretrain, optimizers included, of four models, and what it was

A change that costs the GPU shows here. Everything is counted, with tests/gpuless; times are
projected from the counts (3.0 TB/s, 700 TFLOP/s) and never measured. About 15 minutes on one core
for all parts.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.counted import compiled_step, simulated_kernels
from bench.harness import results
from fastlm.config import PRESETS
from fastlm.model import count_parameters

SMALL = compiled_step.models()["30m"]
BASE = replace(PRESETS["modern-253m"], max_seq_len=4096)
LARGE = compiled_step.models()["1b"]
MODELS = {
    "tiny": (PRESETS["tiny"], 32, 256),
    "30m": (SMALL, 32, 1024),
    "modern-253m": (PRESETS["modern-253m"], 32, 1024),
}
PEERS = {"ours": False, "plain PyTorch": True}


def steps(only: str) -> Iterator[list[dict]]:
    """For each model and stage four quantities of our step, and the plain one's ratio to it."""
    for name, (config, rows, length) in MODELS.items():
        for stage in compiled_step.STEPS:
            case = f"{name}, {stage}, {rows} x {length}"
            if only not in case:
                continue
            found = {
                peer: compiled_step.measure(config, rows, length, plain, stage)
                for peer, plain in PEERS.items()
            }
            for counts in found.values():
                counts["ms"] = counts["projected_ms"] + counts["attention_ms"]
            units = {
                "traffic_gb": "GB through kernels that are not matmuls",
                "launches": "launches of them",
                "saved_gb": "GB saved for the backward",
                "ms": "ms, projected",
            }
            for key, unit in units.items():
                yield results.timed_rows(
                    "compiled step", case, unit, {peer: [f[key]] for peer, f in found.items()}
                )


def kernels(only: str) -> Iterator[list[dict]]:
    for peer, liger in (("ours", False), ("liger", True)):
        where = {"group": "kernels in the simulator", "peer": peer}
        if liger and not results.version("liger-kernel"):
            yield [
                {
                    "group": "kernels in the simulator",
                    "case": "all",
                    "peer": "liger",
                    "missing": "liger-kernel is not installed",
                }
            ]
            return
        for case in simulated_kernels.chosen_cases(liger):
            if only in case.name:
                yield [where | {"case": case.name, "measures": simulated_kernels.counts(case)}]


def scale(only: str) -> Iterator[list[dict]]:
    """Projected time per token, its matmuls, and memory, as modern-253m at 32 x 1024 grows.

    Along four axes.
    """
    points = [
        *(("sequence length", n, BASE, 32768 // n, n) for n in (128, 256, 512, 1024, 2048, 4096)),
        *(("batch rows", n, BASE, n, 1024) for n in (1, 4, 16, 32)),
        *(
            ("vocabulary", n, replace(BASE, vocab_size=n), 32, 1024)
            for n in (1024, 8192, 50257, 131072)
        ),
        *(
            ("million parameters", round(count_parameters(c) / 1e6), c, 32, 1024)
            for c in (
                PRESETS["tiny"],
                SMALL,
                replace(PRESETS["modern-124m"], max_seq_len=4096),
                BASE,
                LARGE,
            )
        ),
    ]
    known: dict[tuple, dict] = {}
    for axis, at, config, rows, length in points:
        if only not in axis:
            continue
        config = replace(config, max_seq_len=max(length, config.max_seq_len))
        key = (config, rows, length)
        found = (
            known[key]
            if key in known
            else known.setdefault(key, compiled_step.measure(config, rows, length))
        )
        tokens, state = (
            found["tokens"],
            16 * count_parameters(config) / 1e9,
        )  # weight, gradient, two moments in fp32
        where = {
            "group": "scale projected",
            "case": f"{axis} {at:,}",
            "unit": "us a token",
            "axis": axis,
            "at": at,
            "rounds": 1,
        }
        memory = {"saved_gb": found["saved_gb"], "state_gb": state, "launches": found["launches"]}
        times = {"ours": found["projected_ms"], "of it matmuls": found["matmul_ms"]}
        for peer, ms in times.items():
            us = 1e3 * (ms + found["attention_ms"]) / tokens
            row = where | {"peer": peer, "median": us, "q10": us, "q90": us}
            yield [row | ({"measures": memory} if peer == "ours" else {})]


def trainer(only: str) -> Iterator[list[dict]]:
    """The whole step of fastlm pretrain, beside the same without kernels for the optimizers."""
    for name, before in compiled_step.trainer_steps_before().items():
        case = f"{name}, 32 x 1024"
        if only not in case:
            continue
        totals = {
            "ours": compiled_step.trainer_step(compiled_step.models()[name], 32, 1024)[-1],
            "before": before[-1],
        }
        units = {
            "gb": "GB through kernels that are not matmuls",
            "launches": "launches of them",
            "bound_ms": "ms, lower bound",
            "expected_ms": "ms, expected",
        }
        for field, unit in units.items():
            values = {peer: [getattr(total, field)] for peer, total in totals.items()}
            yield results.timed_rows("trainer step", case, unit, values)


PARTS = {"steps": steps, "kernels": kernels, "scale": scale, "trainer": trainer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", default=[], help="steps, kernels, scale, trainer (default: all)"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--results", type=Path, default=results.FOLDER / "h100-projected.json")
    args = parser.parse_args()
    machine = results.machine()
    about = {
        "kind": "projected",
        "device": "One H100, projected",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "hardware": {"memory": "3.0 TB/s", "bf16 matmuls": "700 TFLOP/s"},
        "versions": machine["versions"],
    }
    for part in args.parts or PARTS:
        stamp = {"command": f"python -m bench.counted.gpu_program {part}", "date": about["date"]}
        for rows in PARTS[part](args.only):
            results.save(args.results, about, [row | stamp for row in rows])
            for row in rows:
                print(f"{row['case']}: {results.line(row)}", flush=True)


if __name__ == "__main__":
    main()

"""Not a test: run by test_compiled_step.py in a process of its own. Prints one JSON object.

The tools that it uses patch torch.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpuless")]

import fastlm.kernels.audit.flops  # noqa: E402, F401
from fastlm.config import PRESETS  # noqa: E402
from fastlm.model import Transformer, build  # noqa: E402
from gpucompile import DEVICE, compile_for_gpu  # noqa: E402
from gpurun import run_for_gpu  # noqa: E402


def training_step(model, autocast: bool, device: str = "cpu"):
    def step(tokens, targets):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return model.loss(tokens, targets, 1e-4) / targets.numel()

    return step


def compile_only(preset: str, rows: int, length: int, checkpoint_activations: bool) -> dict:
    """The whole step's GPU program at full size.

    fullgraph, so that a graph break or a wait for the GPU is an error.
    """
    box = {}

    def inputs():
        box["model"] = Transformer(PRESETS[preset], checkpoint_activations)
        ids = torch.empty(rows, length, dtype=torch.long)
        return ids, ids.clone()

    def step(*batch):
        return training_step(box["model"], True, DEVICE.type)(*batch)

    report = compile_for_gpu(step, inputs)
    return {
        "graphs": [g.which for g in report.graphs],
        "saved_gb": report.graphs[0].saved_bytes / 1e9,
        "matmul_tflop": sum(node.flops for g in report.graphs for node in g.nodes) / 1e12,
        "custom_ops": sorted(report.custom_ops()),
    }


def execute(autocast: bool, checkpoint_activations: bool) -> dict:
    """Relative errors of a tiny model's compiled step, run on the CPU, against eager."""
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], vocab_size=500)
    model = build(config, 0, torch.device("cpu"), checkpoint_activations=checkpoint_activations)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 1)
    tokens, targets = torch.randint(500, (2, 32)), torch.randint(500, (2, 32))
    targets[0, :7] = -100
    twin = copy.deepcopy(model)
    loss = training_step(model, autocast)(tokens, targets)
    loss.backward()
    report, stats = run_for_gpu(training_step(twin, autocast), lambda: (tokens, targets))
    grads = zip(model.named_parameters(), twin.parameters(), strict=True)
    return {
        "loss": abs(report.result.item() / loss.item() - 1),
        "gradients": {
            name: ((a.grad - b.grad).norm() / a.grad.norm()).item() for (name, a), b in grads
        },
        "launches": sum(len(s) for s in stats.values()),
    }


if __name__ == "__main__":
    functions = {"compile": compile_only, "execute": execute}
    cases = json.loads(sys.argv[1])
    print(json.dumps([functions[name](*arguments) for name, *arguments in cases]))

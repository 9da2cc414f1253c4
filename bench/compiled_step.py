"""The GPU program of a whole compiled training step, counted without a GPU: bytes, launches, memory, and a projected time.

    python bench/compiled_step.py [--preset modern-253m] [--rows 32] [--seq-len 1024] [--plain] [--json]

It needs gpucompile.py in ../shared/tools. The fused ops are counted with their own traffic: what they take in and give out, and
what they move inside (norms' partial sums; for the head's loss three passes over the logits and the cast of its weight).
--plain: the same model written in plain PyTorch. Every time printed is a projection from counts, not a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT.parent / "shared" / "tools")]


def plain_operations():
    """The fused operations as plain PyTorch, for torch.compile to fuse as it likes."""

    def norm(x, weight, eps):
        return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)

    def add_norm(x, residual, weight, eps):
        total = x + residual
        return norm(total, weight, eps), total

    def rope(q, k, cos, sin, positions=None):
        cos, sin = (torch.cat((t, t), -1)[: q.shape[1]].unsqueeze(1) for t in (cos, sin))

        def turn(x):
            half = x.shape[-1] // 2
            return (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin).to(x.dtype)

        return turn(q), turn(k)

    def swiglu(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def loss(h, weight, targets, *, bias, reduction, z_loss, vocab_size, max_counted):
        return F.cross_entropy(F.linear(h, weight, bias)[:, :vocab_size].float(), targets, reduction=reduction)

    return {
        "rms_norm": norm,
        "add_rms_norm": add_norm,
        "rope": rope,
        "swiglu": swiglu,
        "linear_cross_entropy": loss,
        "linear": lambda x, w, sizes=None: F.linear(x, w) if sizes is None else F.linear(x, w).split(sizes, -1),
        "rms_norm_linear": lambda x, w, eps, weight: F.linear(norm(x, w, eps), weight),
        "add_rms_norm_linear": lambda x, r, w, eps, weight: (F.linear(add_norm(x, r, w, eps)[0], weight), x + r),
        "swiglu_linear": lambda gate_up, weight: F.linear(swiglu(gate_up), weight),
    }


def inside(name: str, config, tokens: int) -> tuple[int, int]:
    """(bytes, launches) of one call of a fused op beside what it takes in and gives out."""
    from fastlm.kernels.linear_cross_entropy import chunk_rows
    from fastlm.kernels.rms_norm import _partials

    if "rms_norm_backward" in name:
        return 2 * 4 * _partials(tokens, config.dim) * config.dim, 2  # partial sums written and read
    if "linear_cross_entropy" in name:
        vocab = config.padded_vocab_size
        chunks = -(-tokens // chunk_rows(tokens, vocab, 2, 256 << 20))
        cast = (2 + 4 + 2) * vocab * config.dim  # W read in fp32, written in bf16; read in bf16 by the matmuls alone
        return 3 * 2 * tokens * vocab + cast - 2 * vocab * config.dim, chunks + 2  # rows, the cast, the sum of the rows' losses
    return 0, 1


def measure(preset: str, rows: int, seq_len: int, plain: bool) -> dict:
    from gpucompile import compile_for_gpu

    import fastlm.model
    from fastlm.config import PRESETS

    config, box, tokens = PRESETS[preset], {}, rows * seq_len

    def build():
        box["model"] = fastlm.model.Transformer(config)
        ids = torch.empty(rows, seq_len, dtype=torch.long)
        return ids, ids.clone()

    def step(ids, targets):
        with torch.autocast("cpu", torch.bfloat16):
            return box["model"].loss(ids, targets) / targets.numel()

    with mock.patch.multiple(fastlm.model.kernels, **plain_operations()) if plain else contextlib.nullcontext():
        report = compile_for_gpu(step, build)
    generated = sum(g.pointwise_bytes for g in report.graphs)
    # attention is traced as its CPU operator, which wants its log-sum-exp transposed (a few MB): no GPU attention does
    attention = sum(n for g in report.graphs for k, n in g.launches.items() if "attention_for_cpu" in k)
    launches = sum(sum(g.launches.values()) for g in report.graphs) - attention
    matmul_s, fused = 0.0, {}
    for g in report.graphs:
        for name, given, made, flops in g.nodes:
            if flops or not name.startswith("fastlm."):  # a matmul, or attention
                matmul_s += max((given + made) / 3.0e12, flops / 700e12)
                continue
            extra, calls = inside(name, config, tokens)
            size = extra if "linear_cross_entropy" in name else given + made + extra
            row = fused.setdefault(name, [0, 0, 0.0])
            row[0], row[1], row[2] = row[0] + 1, row[1] + calls, row[2] + size / 1e9
    head_s = 0.0 if plain else 6 * tokens * config.padded_vocab_size * config.dim / 700e12
    traffic = generated / 1e9 + sum(row[2] for row in fused.values())
    seconds = matmul_s + head_s + traffic / 3000
    return {
        "preset": preset, "tokens": tokens, "plain": plain,
        "traffic_gb": traffic, "generated_gb": generated / 1e9, "generated_launches": launches,
        "launches": launches + sum(row[1] for row in fused.values()),
        "cpu_attention_launches": attention,
        "saved_gb": report.graphs[0].saved_bytes / 1e9,
        "projected_ms": 1e3 * seconds, "projected_tokens_per_s": tokens / seconds,
        "fused": fused,
        "generated": {f"{g.which} {k}": n for g in report.graphs for k, n in g.launches.most_common()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="modern-253m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.preset, args.rows, args.seq_len, args.plain)
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, row in value.items():
                print(f"    {name}: {row if isinstance(row, int) else f'{row[0]} calls, {row[1]} launches, {row[2]:.2f} GB'}")
        else:
            print(f"{key}: {value:,.1f}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    main()

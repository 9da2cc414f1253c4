"""The GPU program of a whole compiled training step, counted without a GPU: bytes, launches, memory, and a projected time.

    python bench/compiled_step.py [--preset modern-253m] [--rows 32] [--seq-len 1024] [--stage pretrain] [--plain] [--json]

Counted with tests/gpuless/gpucompile.py. The fused ops are counted with their own traffic: what they take in and give out, and
what they move inside (norms' partial sums; for the head's loss three passes over the logits and the cast of its weight).
--plain: the same model written in plain PyTorch. Every time printed is a projection from counts, not a
measurement; attention's own (attention_ms) is beside the projected time, not in it.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpuless")]


def plain_logprobs(h, weight, targets, *, vocab_size, max_counted):
    """log_softmax and a gather, 0 where the target is not counted."""
    logps = (h @ weight.T)[:, :vocab_size].float().log_softmax(-1).gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
    return logps.where(targets >= 0, 0.0)


def plain_operations():
    """The fused operations as plain PyTorch, for torch.compile to fuse as it likes."""

    def norm(x, weight, eps):
        return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)

    def add_norm(x, residual, weight, eps):
        total = x + residual
        return norm(total, weight, eps), total

    def rope(q, k, cos, sin, positions=None):
        cos, sin = (t[: q.shape[1]] if positions is None else t[positions] for t in (cos, sin))
        cos, sin = (torch.cat((t, t), -1).unsqueeze(-2) for t in (cos, sin))

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
        "linear_logprobs": plain_logprobs,
        "linear": lambda x, w, sizes=None: F.linear(x, w) if sizes is None else F.linear(x, w).split(sizes, -1),
        "rms_norm_linear": lambda x, w, eps, weight: F.linear(norm(x, w, eps), weight),
        "add_rms_norm_linear": lambda x, r, w, eps, weight: (F.linear(add_norm(x, r, w, eps)[0], weight), x + r),
        "swiglu_linear": lambda gate_up, weight: F.linear(swiglu(gate_up), weight),
    }


def inside(name: str, config, tokens: int, counted: int) -> tuple[int, int]:
    """(bytes, launches) of one call of a fused op beside what it takes in and gives out; for the head's ops, in all."""
    from fastlm.kernels.linear_cross_entropy import chunk_rows
    from fastlm.kernels.rms_norm import _partials

    if "rms_norm_backward" in name:
        return 2 * 4 * _partials(tokens, config.dim) * config.dim, 2  # partial sums written and read
    if head_op(name):
        vocab = config.padded_vocab_size
        chunks = -(-counted // chunk_rows(counted, vocab, 2, 256 << 20))
        passes = 3 if "cross_entropy" in name else 2 if "backward" in name else 1  # of the rows kernel over the logits
        cast = (4 + 2) * vocab * config.dim  # W read in fp32, written in bf16
        picked = 3 * 2 * counted * config.dim if counted < tokens else 0  # h's counted rows, and dh spread over all rows
        return passes * 2 * counted * vocab + cast + picked, chunks + 2
    return 0, 1


def head_op(name: str) -> bool:
    return "linear_cross_entropy" in name or "linear_nll" in name


def pretrain_step(model, config, rows: int, seq_len: int):
    """(step, its inputs as shapes and dtypes, counted targets)."""

    def step(ids, targets):
        return model.loss(ids, targets) / targets.numel()

    return step, [(torch.long, rows, seq_len)] * 2, rows * seq_len


def packed_shapes(rows: int, seq_len: int) -> list[tuple]:
    """ids, targets and positions of packed rows, and the boundaries of eight documents a row."""
    return [*[(torch.long, rows, seq_len)] * 3, (torch.int32, 8 * rows + 1)]


def sft_step(model, config, rows: int, seq_len: int):
    """Packed instructions, 4 of 10 targets counted (Alpaca's responses)."""
    counted = rows * seq_len * 4 // 10

    def step(ids, targets, positions, bounds):
        layout = {"positions": positions, "cu_seqlens": bounds, "max_seqlen": seq_len}
        return model.loss(ids, targets, max_counted=counted, **layout) / counted

    return step, packed_shapes(rows, seq_len), counted


def dpo_step(model, config, rows: int, seq_len: int):
    """Packed pairs of answers, half of the targets counted, the reference's log-probabilities read from their file."""
    from fastlm.train import preference

    counted, units = rows * seq_len // 2, 4 * rows

    def step(ids, targets, positions, bounds, unit, reference):
        layout = {"positions": positions, "cu_seqlens": bounds, "max_seqlen": seq_len}
        logps = model.logprobs(ids, targets, max_counted=counted, **layout)
        member = preference.membership(unit, units)
        policy, start = (preference.of_answers(x.flatten(), member) for x in (logps, reference))
        return preference.dpo(policy, start, 0.1)[0].sum() / units

    extra = [(torch.long, rows, seq_len), (torch.float32, rows, seq_len)]
    return step, packed_shapes(rows, seq_len) + extra, counted


def attention_ms(config, tokens: int, length: int) -> float:
    """Causal attention's two products in documents of so many tokens, forward and backward, at 700 TFLOP/s.

    gpucompile.py has no count for attention's operator; the projected time leaves it out, and this is what is left out.
    """
    return 1e3 * tokens * config.n_layers * 6 * length * config.n_heads * config.head_dim / 700e12


STEPS = {"pretrain": pretrain_step, "sft": sft_step, "dpo": dpo_step}


def measure(config, rows: int, seq_len: int, plain: bool = False, stage: str = "pretrain") -> dict:
    """Counts of one compiled step of a stage: rows x seq_len tokens, bf16 autocast, forward and backward."""
    from gpucompile import DEVICE, compile_for_gpu

    import fastlm.kernels.flops
    import fastlm.model

    box, tokens = {}, rows * seq_len

    def build():
        model = fastlm.model.Transformer(config)
        box["step"], shapes, box["counted"] = STEPS[stage](model, config, rows, seq_len)
        return tuple(torch.empty(shape, dtype=dtype) for dtype, *shape in shapes)

    def step(*batch):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return box["step"](*batch)

    def unavailable(*tensors: torch.Tensor) -> bool:  # the native kernels: a GPU takes PyTorch's attention
        return False

    swapped = mock.patch.multiple(fastlm.model.kernels, **plain_operations()) if plain else contextlib.nullcontext()
    no_kept_logits = mock.patch.object(sys.modules["fastlm.kernels.linear_cross_entropy"], "KEPT_BYTES", 0)  # nor there
    with swapped, no_kept_logits, mock.patch("fastlm.attention.cpu.available", unavailable):
        report = compile_for_gpu(step, build)
    generated = sum(g.generated_bytes for g in report.graphs)
    # attention is traced as its CPU operator, which wants its log-sum-exp transposed (a few MB): no GPU attention does
    attention = sum(n for g in report.graphs for k, n in g.launches.items() if "attention_for_cpu" in k)
    launches = sum(sum(g.launches.values()) for g in report.graphs) - attention
    matmul_s, fused, head_s = 0.0, {}, 0.0
    for g in report.graphs:
        for name, given, made, flops in g.nodes:
            if name.startswith("aten") and "attention" in name:  # a CUDA build knows its FLOPs: they are attention_ms
                continue
            if flops or not name.startswith("fastlm.") or "packed_documents" in name:  # a matmul, or attention
                matmul_s += max((given + made) / 3.0e12, flops / 700e12)
                continue
            extra, calls = inside(name, config, tokens, box["counted"])
            size = extra if head_op(name) else given + made + extra
            row = fused.setdefault(name, [0, 0, 0.0])
            row[0], row[1], row[2] = row[0] + 1, row[1] + calls, row[2] + size / 1e9
            if head_op(name):
                matmuls = 1 if name.endswith("linear_nll.default") else 3
                head_s += 2 * matmuls * box["counted"] * config.padded_vocab_size * config.dim / 700e12
    traffic = generated / 1e9 + sum(row[2] for row in fused.values())
    seconds = matmul_s + head_s + traffic / 3000
    return {
        "tokens": tokens, "plain": plain,
        "traffic_gb": traffic, "generated_gb": generated / 1e9, "generated_launches": launches,
        "launches": launches + sum(row[1] for row in fused.values()),
        "cpu_attention_launches": attention,
        "saved_gb": report.graphs[0].saved_bytes / 1e9,
        "matmul_ms": 1e3 * (matmul_s + head_s),
        "attention_ms": attention_ms(config, tokens, seq_len if stage == "pretrain" else seq_len // 8),
        "projected_ms": 1e3 * seconds, "projected_tokens_per_s": tokens / seconds,
        "fused": fused,
        "generated": {f"{g.which} {k}": n for g in report.graphs for k, n in g.launches.most_common()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="modern-253m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--stage", default="pretrain", choices=STEPS)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from fastlm.config import PRESETS

    result = measure(PRESETS[args.preset], args.rows, args.seq_len, args.plain, args.stage)
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

"""A whole compiled training step's GPU program, counted without a GPU: bytes, launches, memory.

    python -m bench.counted.compiled_step [--preset modern-253m] [--rows 32] [--seq-len 1024]
                                          [--stage pretrain] [--plain] [--json]
    python -m bench.counted.compiled_step --trainer [--before] [--preset modern-253m]
                                          [--rows 32] [--seq-len 1024]

Counted with tests/gpuless/gpucompile.py. The fused ops are counted with their own traffic: what
they take in and give out, and what they move inside (norms' partial sums; for the head's loss two
passes over the logits, since their second read finds them in the L2 cache (docs/kernels.md), and
the cast of its weight). What is kept for the backward is decided as on an 80 GB GPU.

--plain: the same model written in plain PyTorch. --trainer: the whole step of fastlm pretrain, with
clipping, Muon and AdamW (optimizer_step.py); --before: that step, 32 x 1024, as it was before the
optimizers had kernels of their own.

Every time printed is a projection from counts, not a measurement. Attention's own (attention_ms)
stands beside the projected time and is not in it, but is in the trainer's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "gpuless"))


H100 = 79 << 30, 132  # bytes of memory, multiprocessors


def plain_logprobs(h, weight, targets, *, vocab_size, max_counted, keep_bytes):
    """log_softmax and a gather, 0 where the target is not counted."""
    logps = (
        (h @ weight.T)[:, :vocab_size]
        .float()
        .log_softmax(-1)
        .gather(1, targets.clamp_min(0).unsqueeze(1))
        .squeeze(1)
    )
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
        cos, sin = (torch.cat((t.float(), t.float()), -1).unsqueeze(-2) for t in (cos, sin))

        def turn(x):
            half = x.shape[-1] // 2
            return (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin).to(x.dtype)

        return turn(q), turn(k)

    def swiglu(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def loss(h, weight, targets, *, reduction, z_loss, vocab_size, bias=None, max_counted=None):
        return F.cross_entropy(
            F.linear(h, weight, bias)[:, :vocab_size].float(), targets, reduction=reduction
        )

    return {
        "rms_norm": norm,
        "add_rms_norm": add_norm,
        "rope": rope,
        "swiglu": swiglu,
        "linear_cross_entropy": loss,
        "linear_logprobs": plain_logprobs,
        "linear": lambda x, w, sizes=None: (
            F.linear(x, w) if sizes is None else F.linear(x, w).split(sizes, -1)
        ),
        "swiglu_linear": lambda gate_up, weight, keep_product: F.linear(swiglu(gate_up), weight),
    }


def inside(name: str, config, tokens: int, counted: int) -> tuple[int, int]:
    """(bytes, launches) of a fused op's call, beside what it takes in and gives out.

    For the head's ops, in all.
    """
    from fastlm.kernels.triton.rms_norm import partial_sums

    if "rms_norm_backward" in name:
        return 2 * 4 * partial_sums(tokens) * config.dim, 2  # partial sums written and read
    if head_op(name):
        vocab = config.padded_vocab_size
        chunks = head_chunks(config, counted)
        passes = (
            1 if name.endswith("linear_nll.default") else 2
        )  # of the rows kernel over the logits
        cast = (4 + 2) * vocab * config.dim  # W read in fp32, written in bf16
        picked = (
            3 * 2 * counted * config.dim if counted < tokens else 0
        )  # h's counted rows, and dh spread over all rows
        return passes * 2 * counted * vocab + cast + picked, chunks + 2
    return 0, 1


def head_chunks(config, counted: int) -> int:
    """How many chunks of logits the head's ops make."""
    from fastlm.kernels.head_chunks import gpu_chunk_rows

    return -(-counted // gpu_chunk_rows(counted, 2 * config.padded_vocab_size, config.dim, *H100))


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
    """Packed pairs of answers, half of the targets counted.

    The reference's log-probabilities are read from their file.
    """
    from fastlm.train import losses

    counted, units = rows * seq_len // 2, 4 * rows

    def step(ids, targets, positions, bounds, unit, reference):
        layout = {"positions": positions, "cu_seqlens": bounds, "max_seqlen": seq_len}
        logps = model.logprobs(ids, targets, max_counted=counted, **layout)
        member = losses.membership(unit, units)
        policy, start = (losses.sum_per_answer(x.flatten(), member) for x in (logps, reference))
        return losses.dpo(policy, start, 0.1)[0].sum() / units

    extra = [(torch.long, rows, seq_len), (torch.float32, rows, seq_len)]
    return step, packed_shapes(rows, seq_len) + extra, counted


def attention_ms(config, tokens: int, length: int) -> float:
    """Time of causal attention's two products, forward and backward, at 700 TFLOP/s.

    In documents of so many tokens. gpucompile.py has no count for attention's operator: the
    projected time leaves it out, and this is what is left out.
    """
    return 1e3 * tokens * config.n_layers * 6 * length * config.n_heads * config.head_dim / 700e12


STEPS = {"pretrain": pretrain_step, "sft": sft_step, "dpo": dpo_step}


def measure(config, rows: int, seq_len: int, plain: bool = False, stage: str = "pretrain") -> dict:
    """Counts of one compiled step of a stage, forward and backward, under bf16 autocast.

    The step has rows x seq_len tokens.
    """
    import fastlm.kernels.audit.flops
    import fastlm.model
    from gpucompile import DEVICE, compile_for_gpu

    box, tokens = {}, rows * seq_len

    def build():
        model = fastlm.model.Transformer(config)
        fastlm.model.keep_what_fits(model, tokens, H100[0], 2)
        box["step"], shapes, box["counted"] = STEPS[stage](model, config, rows, seq_len)
        box["kept"] = min(
            1.0, model.keep_logits_bytes / (2 * config.padded_vocab_size * box["counted"])
        )
        return tuple(torch.empty(shape, dtype=dtype) for dtype, *shape in shapes)

    def step(*batch):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return box["step"](*batch)

    def unavailable(
        *tensors: torch.Tensor,
    ) -> bool:  # the native kernels: a GPU takes PyTorch's attention
        return False

    swapped = (
        mock.patch.multiple(fastlm.kernels, **plain_operations())
        if plain
        else contextlib.nullcontext()
    )
    with swapped, mock.patch("fastlm.kernels.native.available", unavailable):
        report = compile_for_gpu(step, build)
    generated = sum(g.generated_bytes for g in report.graphs)
    # attention is traced as its CPU operator, which wants its log-sum-exp transposed (a few MB): no
    # GPU attention does
    attention = sum(
        n for g in report.graphs for k, n in g.launches.items() if "attention_for_cpu" in k
    )
    launches = sum(sum(g.launches.values()) for g in report.graphs) - attention
    matmul_s, fused, head_s = 0.0, {}, 0.0
    for g in report.graphs:
        for name, given, made, flops in g.nodes:
            if (
                name.startswith("aten") and "attention" in name
            ):  # a CUDA build knows its FLOPs: they are attention_ms
                continue
            if (
                flops or not name.startswith("fastlm.") or "packed_documents" in name
            ):  # a matmul, or attention
                matmul_s += max((given + made) / 3.0e12, flops / 700e12)
                continue
            extra, calls = inside(name, config, tokens, box["counted"])
            size = extra if head_op(name) else given + made + extra
            row = fused.setdefault(name, [0, 0, 0.0])
            row[0], row[1], row[2] = row[0] + 1, row[1] + calls, row[2] + size / 1e9
            if head_op(name):
                matmuls = (
                    1
                    if name.endswith("linear_nll.default")
                    else 3 - box["kept"]
                    if "backward" in name
                    else 3
                )
                head_s += (
                    2 * matmuls * box["counted"] * config.padded_vocab_size * config.dim / 700e12
                )
    traffic = generated / 1e9 + sum(row[2] for row in fused.values())
    seconds = matmul_s + head_s + traffic / 3000
    return {
        "tokens": tokens,
        "plain": plain,
        "traffic_gb": traffic,
        "generated_gb": generated / 1e9,
        "generated_launches": launches,
        "launches": launches + sum(row[1] for row in fused.values()),
        "cpu_attention_launches": attention,
        "saved_gb": report.graphs[0].saved_bytes / 1e9,
        # dW of the head, fp32, read and written by its matmuls: in no other figure here
        "head_dw_gb": (2 * head_chunks(config, box["counted"]) - 1)
        * 4
        * config.padded_vocab_size
        * config.dim
        / 1e9,
        "matmul_ms": 1e3 * (matmul_s + head_s),
        "attention_ms": attention_ms(
            config, tokens, seq_len if stage == "pretrain" else seq_len // 8
        ),
        "projected_ms": 1e3 * seconds,
        "projected_tokens_per_s": tokens / seconds,
        "fused": fused,
        "generated": {
            f"{g.which} {k}": n for g in report.graphs for k, n in g.launches.most_common()
        },
    }


class Part(NamedTuple):
    """One part of the trainer's step: attention, matmuls, or what passes through other kernels.

    gb and launches: of the kernels that are not matmuls.
    """

    name: str
    gb: float
    launches: int
    bound_ms: float  # at 3.0 TB/s and 700 TFLOP/s
    expected_ms: float  # at the rates that are assumed to be reached


# Assumed: kernels reach 85% of 3.0 TB/s, matmuls 90% of 700 TFLOP/s; attention 288 TFLOP/s, which
# is cuDNN's forward with heads of 64 at 1,024 tokens in the FlashAttention-3 paper (Shah et al.
# 2024).
KERNELS_REACH = 0.85
MATMULS_REACH = 0.9
ATTENTION_REACHES = 288 / 700
# Counted at commit d3e1301 by the same functions; the launches of its clipping are those that
# PyTorch made on fakegpu.
BEFORE = ROOT / "bench" / "results" / "before" / "trainer-step.json"


def models() -> dict:
    """The presets, and one shape on each side of them."""
    from fastlm.config import PRESETS, ModelConfig

    large = {
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "ffn_dim": 8192,
        "max_seq_len": 4096,
    }
    small = {
        "dim": 384,
        "n_layers": 6,
        "n_heads": 6,
        "n_kv_heads": 6,
        "ffn_dim": 1024,
        "max_seq_len": 4096,
    }
    return {"30m": ModelConfig(**small), **PRESETS, "1b": ModelConfig(**large)}


def trainer_step(config, rows: int, seq_len: int) -> list[Part]:
    """The parts of a step of fastlm pretrain with Muon, and their sum.

    Not in it: batches, which are copied beside the step before (0.5 MB for 32,768 tokens), and gaps
    between launches.
    """
    from bench.counted import optimizer_step

    def part(name: str, gb: float, launches: int, matmul_ms: float) -> Part:
        expected = gb / (3.0 * KERNELS_REACH) + matmul_ms / MATMULS_REACH
        return Part(name, gb, launches, gb / 3.0 + matmul_ms, expected)

    found = measure(config, rows, seq_len)
    attention = found["attention_ms"]
    parts = [
        part("forward and backward: matmuls", 0.0, 0, found["matmul_ms"]),
        Part("forward and backward: attention", 0.0, 0, attention, attention / ATTENTION_REACHES),
        part("forward and backward: the rest", found["traffic_gb"], found["launches"], 0.0),
    ]
    for name, counted in optimizer_step.count(config).items():
        parts.append(part(name, counted.traffic / 1e9, counted.launches, 1e3 * counted.matmul_s))
    gb, launches, bound, expected = (sum(column) for column in list(zip(*parts, strict=True))[1:])
    return [*parts, Part("in all", gb, launches, bound, expected)]


def trainer_steps_before() -> dict[str, list[Part]]:
    found = json.loads(BEFORE.read_text(encoding="utf-8"))
    return {name: [Part(*row) for row in rows] for name, rows in found.items()}


def print_trainer_step(config, rows: int, seq_len: int, parts: list[Part]) -> None:
    from fastlm.model import training_flops_per_token

    print(
        f"{'projected, not measured':34} {'GB':>6} {'launches':>8} "
        f"{'bound, ms':>9} {'expected, ms':>12}"
    )
    for p in parts:
        print(f"{p.name:34} {p.gb:6.2f} {p.launches:8} {p.bound_ms:9.2f} {p.expected_ms:12.2f}")
    flops = training_flops_per_token(config, seq_len)
    for name, ms in (("bound", parts[-1].bound_ms), ("expected", parts[-1].expected_ms)):
        rate = 1e3 * rows * seq_len / ms
        print(f"{name}: {rate:,.0f} tokens/s, {rate * flops / 989e12:.1%} MFU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="modern-253m", choices=models())
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--stage", default="pretrain", choices=STEPS)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--trainer", action="store_true")
    parser.add_argument("--before", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = models()[args.preset]
    if args.before:
        print_trainer_step(config, 32, 1024, trainer_steps_before()[args.preset])
        return
    if args.trainer:
        parts = trainer_step(config, args.rows, args.seq_len)
        if args.json:
            print(json.dumps(parts))
        else:
            print_trainer_step(config, args.rows, args.seq_len, parts)
        return
    result = measure(config, args.rows, args.seq_len, args.plain, args.stage)
    if args.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, row in value.items():
                if not isinstance(row, int):
                    row = f"{row[0]} calls, {row[1]} launches, {row[2]:.2f} GB"
                print(f"    {name}: {row}")
        else:
            print(f"{key}: {value:,.1f}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    main()

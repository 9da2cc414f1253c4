"""The training steps of modern-253m on a GPU: eager, compiled, in plain PyTorch compiled (pretraining), and the matmul bound.

Forward, backward, clipping and fused AdamW; bf16 autocast over fp32 weights; random tokens, in SFT and DPO eight documents a
row, of whose targets 4 in 10 and half are counted. The bound is the
step's counted FLOPs at the rate of a large matmul measured in the same rounds. Without a GPU: one step of one layer.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from compiled_step import STEPS, plain_operations
from gpu_timing import FAILURES, device, in_turns, joules, on_gpu, on_stream, peak_bytes, say

import fastlm.model
from fastlm.config import PRESETS, ModelConfig
from fastlm.model import build, training_flops_per_token

DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense bf16 FLOP/s, of MFU

REHEARSED = ModelConfig(vocab_size=100, dim=32, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=64, max_seq_len=8)


@dataclass(frozen=True)
class Size:
    preset: str
    rows: int
    seq_len: int
    matmul: int

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len


def size(measuring: bool) -> Size:
    if not (measuring and on_gpu()):
        return Size("", 1, 8, 64)
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Size("modern-253m", 32 if gib > 70 else 8 if gib > 20 else 2, 1024, 8192)


def batch(stage: str, config: ModelConfig, s: Size) -> list[torch.Tensor]:
    """What the stage's step takes (compiled_step.STEPS): ids and targets, and for packed rows where the documents lie."""
    ids, targets = torch.randint(config.vocab_size, (2, s.rows, s.seq_len), device=device())
    if stage == "pretrain":
        return [ids, targets]
    at = torch.arange(s.tokens, device=device()).view(s.rows, s.seq_len)
    counted = at % 10 >= 6 if stage == "sft" else at % 2 == 1
    length = s.seq_len // 8
    bounds = torch.arange(0, s.tokens + 1, length, device=device(), dtype=torch.int32)
    packed = [ids, targets.where(counted, -100), at % length, bounds]
    if stage == "sft":
        return packed
    return [
        *packed,
        (at // (2 * length)).where(counted, -1),
        torch.randn(s.rows, s.seq_len, device=device()).where(counted, 0.0),
    ]


def training_step(stage: str, config: ModelConfig, s: Size, compiled: bool, plain: bool) -> Callable[[], None]:
    """A step as the trainer does it: autocast, backward, clip, optimizer; with plain, the fused operations in plain PyTorch."""
    model = build(config, 0, device())
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, fused=True)
    loss, inputs = STEPS[stage](model, config, s.rows, s.seq_len)[0], batch(stage, config, s)
    if compiled:
        loss = torch.compile(loss, fullgraph=True, dynamic=False, backend="inductor" if on_gpu() else "eager")

    def step() -> None:
        fused = mock.patch.multiple(fastlm.model.kernels, **plain_operations()) if plain else contextlib.nullcontext()
        with fused, torch.autocast(device().type, torch.bfloat16, enabled=on_gpu()):
            mean = loss(*inputs)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_flops(stage: str, config: ModelConfig, s: Size) -> float:
    """FLOPs of a step; in SFT and DPO the head is multiplied for counted targets only, 3 and 4 times, in short documents."""
    head, length = {"pretrain": (1.0, s.seq_len), "sft": (0.4, s.seq_len // 8), "dpo": (0.5 * 4 / 3, s.seq_len // 8)}[stage]
    return training_flops_per_token(replace(config, vocab_size=round(config.vocab_size * head)), length) * s.tokens


def matmul(n: int) -> Callable[[], object]:
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16 if on_gpu() else torch.float32) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def allocated() -> int:
    return torch.cuda.memory_allocated() if on_gpu() else 0


def measures_of(times: dict[str, list[float]], flops: float, tokens: int, turns: dict[str, Callable]) -> dict[str, dict]:
    """Tokens per second, MFU where the data sheet is known, and joules per token by the GPU's meter."""
    found = {name: {"tokens_per_second": 1e3 * tokens / statistics.median(ms)} for name, ms in times.items()}
    peak = next((p for key, p in DATA_SHEET.items() if on_gpu() and key in torch.cuda.get_device_name()), None)
    for name, ms in times.items():
        if peak:
            found[name]["mfu"] = 1e3 * flops / statistics.median(ms) / peak
        if name != "matmul" and on_gpu() and (spent := joules(turns[name], 2.0)):
            found[name]["joules_per_token"] = spent[0] / spent[1] / tokens
    return found


@pytest.mark.parametrize("stage", STEPS)
def test_gpu_training(stage, measuring, record, benchmark, kernels_on_device):
    s = size(measuring)
    config = PRESETS[s.preset] if s.preset else REHEARSED
    builds = {"ours": (True, False), "ours eager": (False, False)}
    if stage == "pretrain":
        builds["plain PyTorch compiled"] = (True, True)
    elif not on_gpu():
        del builds["ours eager"]  # rehearsed in the first stage; the interpreter takes seconds
    flops, memory, failed = step_flops(stage, config, s), {}, []
    with on_stream():
        turns: dict[str, Callable] = {"matmul": matmul(s.matmul)}

    def measure() -> None:
        times = in_turns(turns, 8)
        rate = [2 * s.matmul**3 / ms for ms in times["matmul"]]  # FLOP a millisecond
        times["matmul"] = [flops / r for r in rate]
        record(times, unit="ms", measures=measures_of(times, flops, s.tokens, turns))
        if on_gpu():
            record(memory, unit="peak GiB")

    for name, options in builds.items():
        try:
            before = allocated()
            with on_stream():
                step = training_step(stage, config, s, *options)
                step()
            memory[name] = [(allocated() - before + peak_bytes(step)) / 2**30]
            turns[name] = step
        except FAILURES as error:
            record(peer=name, failed=say(error))
            failed.append(name)
        if on_gpu() and name != list(builds)[-1]:
            measure()  # compiling the next one takes a minute, and the time may be over before
    benchmark.pedantic(measure)
    assert not failed, f"failed: {', '.join(failed)}"

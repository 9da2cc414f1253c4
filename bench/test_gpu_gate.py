"""Before anything is measured: what this GPU reaches, and whether the training step on it is right.

ceilings   a copy, and the matmuls of modern-253m at 32 x 1024 tokens, bf16
gradients  loss and every gradient of modern-253m, 4 x 1024 tokens: compiled and eager, bf16,
           against plain PyTorch in fp32; for plain rows, packed documents and activation
           checkpointing
steps      fastlm's own pretraining stage, 32 x 1024 tokens: no step may make the host wait for the
           GPU, and nothing may be compiled after the first one

Tolerance of a gradient: |ours - fp32| / |fp32| (Euclidean norms) is at most 1.5 times that of
plain PyTorch in bf16 plus 0.002; the loss differs from fp32 by at most 1.5 times its difference
plus 0.001.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.counted.compiled_step import plain_operations
from bench.harness.gpu_stage import pretrain_config, run_folder, size, watch
from bench.harness.gpu_timing import device, in_turns, on_gpu, on_stream, rehearsing
from fastlm import kernels
from fastlm.config import ModelConfig
from fastlm.model import Transformer, build, training_flops_per_token
from fastlm.train.pretrain import pretrain

FACTOR = 1.5
GRADIENT_SLACK = 2e-3
LOSS_SLACK = 1e-3
ROWS = 4  # of the gradients
DOCUMENTS = 8  # in a packed row
KINDS = ("rows", "packed", "checkpointed")


# ---------------------------------------------------------------- ceilings


def matmuls(c: ModelConfig, tokens: int) -> dict[str, tuple[int, int, int]]:
    """name -> (m, k, n) of a product (m, k) x (k, n): forward passes, and gradients of weights."""
    heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    chunk = min(tokens, 8448)  # rows of the head's logits
    return {
        "qkv": (tokens, c.dim, heads),
        "out": (tokens, c.n_heads * c.head_dim, c.dim),
        "gate_up": (tokens, c.dim, 2 * c.ffn_dim),
        "down": (tokens, c.ffn_dim, c.dim),
        "head": (chunk, c.dim, c.padded_vocab_size),
        "gate_up, weight's gradient": (2 * c.ffn_dim, tokens, c.dim),
        "head, weight's gradient": (c.padded_vocab_size, chunk, c.dim),
    }


def product(m: int, k: int, n: int) -> Callable[[], object]:
    options: dict[str, Any] = {"device": device(), "dtype": torch.bfloat16}
    a = torch.randn(m, k, **options)
    b = torch.randn(k, n, **options)
    out = torch.empty(m, n, **options)
    return lambda: torch.mm(a, b, out=out)


def copy(elements: int) -> Callable[[], object]:
    source = torch.empty(elements, device=device(), dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def test_gpu_ceilings(measuring, record, kernels_on_device):
    s = size(measuring)
    elements = 1 << (30 if measuring and not rehearsing() else 12)
    with on_stream():
        times = in_turns({"copy": copy(elements)}, 10)
    moved = 2 * 2 * elements  # bytes: read and written, in bf16
    speed = {"gb_per_second": moved / 1e6 / sorted(times["copy"])[len(times["copy"]) // 2]}
    record(times, "ms", case=f"{moved / 2**30:.3g} GiB", measures={"copy": speed})
    for name, (m, k, n) in matmuls(s.model, s.tokens).items():
        with on_stream():
            times = in_turns({"matmul": product(m, k, n)}, 10)
        milliseconds = sorted(times["matmul"])[len(times["matmul"]) // 2]
        speed = {"tflop_per_second": 2 * m * k * n / 1e9 / milliseconds}
        record(times, "ms", case=f"{name}: {m} x {k} x {n}", measures={"matmul": speed})


# ---------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Backward:
    """A loss and the gradient of every parameter, by name."""

    loss: float
    gradients: dict[str, Tensor]

    def errors(self, truth: Backward) -> dict[str, float]:
        """|this - truth| / |truth| of each gradient."""
        found = {}
        for name, true in truth.gradients.items():
            found[name] = ((self.gradients[name] - true).norm() / true.norm()).item()
        return found


Batch = tuple[list[Tensor], dict[str, Any]]


def batch(kind: str, c: ModelConfig, rows: int, seq_len: int) -> Batch:
    """ids and targets, every tenth not counted; and where the documents of packed rows lie."""
    generator = torch.Generator(device()).manual_seed(0)
    shape = (2, rows, seq_len)
    ids, targets = torch.randint(c.vocab_size, shape, device=device(), generator=generator)
    targets[:, ::10] = -100
    if kind != "packed":
        return [ids, targets], {}
    length = seq_len // DOCUMENTS
    at = torch.arange(rows * seq_len, device=device()).view(rows, seq_len)
    bounds = torch.arange(0, rows * seq_len + 1, length, device=device(), dtype=torch.int32)
    return [ids, targets], {
        "positions": at % length,
        "cu_seqlens": bounds,
        "max_seqlen": seq_len,
    }


def starting_model(c: ModelConfig, kind: str) -> Transformer:
    """A model of which no gradient is zero: as initialised, every block writes nothing."""
    found = build(c, 0, device(), checkpoint_activations=kind == "checkpointed")
    generator = torch.Generator(device()).manual_seed(1)
    with torch.no_grad():
        for block in found.blocks:
            block.out.weight.normal_(0, 0.02, generator=generator)
            block.down.weight.normal_(0, 0.02, generator=generator)
    return found.train()


def run_backward(
    network: Transformer,
    loss: Callable[..., Tensor],
    given: Batch,
    dtype: torch.dtype,
) -> Backward:
    (ids, targets), layout = given
    half = dtype == torch.bfloat16 and on_gpu()
    with torch.autocast(device().type, torch.bfloat16, enabled=half):
        mean = loss(ids, targets, **layout) / targets.numel()
    mean.backward()
    gradients = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
        parameter.grad = None
    return Backward(mean.item(), gradients)


@contextlib.contextmanager
def in_plain_pytorch():
    with mock.patch.multiple(kernels, **plain_operations()):
        yield


def problems(
    name: str,
    ours: Backward,
    plain: Backward,
    truth: Backward,
    worst: dict[str, float],
) -> list[str]:
    """What of ours is further from the truth than plain PyTorch in the same dtype."""
    found = []
    allowed = FACTOR * abs(plain.loss - truth.loss) + LOSS_SLACK
    if not abs(ours.loss - truth.loss) <= allowed:
        found.append(f"{name}: the loss is {ours.loss:.6f}, in fp32 {truth.loss:.6f}")
    theirs = plain.errors(truth)
    errors = ours.errors(truth)
    for parameter, error in errors.items():
        if not error <= FACTOR * theirs[parameter] + GRADIENT_SLACK:
            plainly = theirs[parameter]
            found.append(f"{name}: {parameter} is off by {error:.4f}, plain by {plainly:.4f}")
    worst[f"{name.replace(' ', '_')}_gradient_error"] = max(errors.values())
    worst[f"{name.replace(' ', '_')}_loss_error"] = abs(ours.loss - truth.loss)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gpu_gradients(kind, measuring, record, kernels_on_device):
    s = size(measuring)
    given = batch(kind, s.model, min(ROWS, s.rows), s.seq_len)
    network = starting_model(s.model, kind)
    backend = "inductor" if on_gpu() else "eager"
    compiled = torch.compile(network.loss, fullgraph=True, dynamic=False, backend=backend)
    with in_plain_pytorch():
        truth = run_backward(network, network.loss, given, torch.float32)
        plain = run_backward(network, network.loss, given, torch.bfloat16)
    eager = run_backward(network, network.loss, given, torch.bfloat16)
    fused = run_backward(network, compiled, given, torch.bfloat16)
    figures: dict[str, float] = {}
    found = problems("compiled", fused, plain, truth, figures)
    found += problems("eager", eager, plain, truth, figures)
    figures["plain_gradient_error"] = max(plain.errors(truth).values())
    figures["plain_loss_error"] = abs(plain.loss - truth.loss)
    figures["compiled_against_eager"] = max(fused.errors(eager).values())
    if on_gpu() and rehearsing():
        record(note="not checked: rehearsal, the stand-in for a GPU computes nothing")
        return
    record(measures={"ours": figures})
    assert not found, f"{len(found)} problems: {'; '.join(found[:5])}"


# ---------------------------------------------------------------- steps

OPTIONS: dict[str, dict[str, Any]] = {
    "rows": {},
    "packed": {"isolate_documents": True},
    "checkpointed": {"checkpoint_activations": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_gpu_steps(kind, measuring, record, kernels_on_device):
    s = size(measuring)
    with run_folder() as run:
        seen = watch(pretrain, pretrain_config(s, run, **OPTIONS[kind]), s, s.few_steps)
    figures = seen.figures(training_flops_per_token(s.model, s.seq_len))
    record(measures={"ours": figures}, fields=seen.fields(s))
    assert not seen.waits, f"the host waits for the GPU in a step: {dict(seen.waits)}"
    assert not seen.compiled_late, f"{seen.compiled_late} graphs were compiled after the first step"

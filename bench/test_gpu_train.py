"""Pretraining modern-253m on a GPU by fastlm's own stage, 32 x 1,024 tokens of real text, bf16.

"ours" is the whole stage for 300 steps: Muon, clipping, monitor, prefetched batches, the last
validation and checkpoint; its loss curve is kept. Each other contender is 30 steps of it with one
thing changed, or a peer, in a process of its own (bench/scripts/gpu.py starts one for each). "plain
PyTorch compiled" is the same loop with the fused operations written in plain PyTorch. Times are
those between the starts of neighbouring steps on the GPU's clock, after ten steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from bench.counted.compiled_step import plain_operations
from bench.harness.gpu_profile import Profile, categories, longest, mark_steps
from bench.harness.gpu_stage import Seen, Size, pretrain_config, run_folder, size, watch
from bench.harness.gpu_timing import device, on_gpu, rehearsing
from bench.peers.gpu import absent
from fastlm import kernels
from fastlm.attention_backend import unusable
from fastlm.model import training_flops_per_token
from fastlm.train.pretrain import pretrain

PROFILED = 4  # steps
OTHER_ATTENTION = ("flash", "flash3", "flash4", "xformers")
CHUNKS = {"head chunks of 256 MiB": 256 << 20, "head chunks of 4 GiB": 4 << 30}
SDPA = {
    "attention: torch, FlashAttention": "FLASH_ATTENTION",
    "attention: torch, cuDNN": "CUDNN_ATTENTION",
}


def whole(s: Size) -> Seen:
    with run_folder() as run:
        return watch(pretrain, pretrain_config(s, run), s)


def few_steps(s: Size, **options: Any) -> Seen:
    with run_folder() as run:
        return watch(pretrain, pretrain_config(s, run, **options), s, s.few_steps)


def adamw(s: Size) -> Seen:
    with run_folder() as run:
        cfg = pretrain_config(s, run)
        cfg = replace(cfg, optim=replace(cfg.optim, name="adamw"))
        return watch(pretrain, cfg, s, s.few_steps)


def monitor_off(s: Size) -> Seen:
    def silence(given: dict[str, Any]) -> None:
        given["monitor"].step = lambda *figures: None

    with run_folder() as run:
        return watch(pretrain, pretrain_config(s, run), s, s.few_steps, prepare=silence)


def chunks(s: Size, size: int) -> Seen:
    """The head's loss with logits of so many bytes at a time."""
    head = functools.partial(kernels.linear_cross_entropy, chunk_bytes=size)
    with mock.patch.object(kernels, "linear_cross_entropy", head):
        return few_steps(s)


def nothing_kept(s: Size) -> Seen:
    """As on a small GPU: SwiGLU's product is made again in the backward."""
    with mock.patch("fastlm.train.run.keep_what_fits", return_value=None):
        return few_steps(s)


def sdpa(s: Size, name: str) -> Seen:
    """PyTorch's attention with one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, name)
    if on_gpu() and not rehearsing():
        q = torch.empty(1, 1, 64, s.model.head_dim, device=device(), dtype=torch.bfloat16)
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        except RuntimeError as error:
            pytest.skip(f"this GPU or build does not have it: {error}".splitlines()[0])
    allowed = [SDPBackend.MATH] if rehearsing() else [backend]
    with sdpa_kernel(allowed):
        return few_steps(s, attention="torch")


def other(s: Size, name: str) -> Seen:
    """Attention from another package."""
    return few_steps(s, attention=name)


def plain(s: Size) -> Seen:
    with mock.patch.multiple(kernels, **plain_operations()):
        return few_steps(s)


def hugging_face(s: Size) -> Seen:
    from bench.peers import llama

    return llama.train(s, s.few_steps)


def absent_contenders() -> dict[str, str]:
    """Contenders that cannot run here, and why."""
    why = {"Hugging Face Llama compiled": absent("transformers", "transformers")}
    for name in OTHER_ATTENTION:
        problem = unusable(name, device(), torch.bfloat16) if on_gpu() else "needs a GPU"
        why[f"attention {name}"] = f"{name} {problem}" if problem else ""
    return {name: problem for name, problem in why.items() if problem}


ABSENT = absent_contenders()
ALL: dict[str, Callable[[Size], Seen]] = {
    "ours": whole,
    "ours AdamW": adamw,
    "ours monitor off": monitor_off,
    "plain PyTorch compiled": plain,
    "Hugging Face Llama compiled": hugging_face,
    "SwiGLU's product made again": nothing_kept,
    **{name: functools.partial(chunks, size=size) for name, size in CHUNKS.items()},
    **{name: functools.partial(sdpa, name=kernel) for name, kernel in SDPA.items()},
    **{f"attention {name}": functools.partial(other, name=name) for name in OTHER_ATTENTION},
}
CONTENDERS = {name: contender for name, contender in ALL.items() if name not in ABSENT}


def test_gpu_profile(measuring, record, kernels_on_device):
    """A few steps by category: milliseconds of the GPU and kernels, a step."""
    s = size(measuring)
    steps = min(PROFILED, s.steps - s.warmup - 1)
    with run_folder() as run:
        profile = Profile(run.parent / "trace.json")
        actions = {s.warmup: profile.start, s.warmup + steps: profile.stop}

        def prepare(given: dict[str, Any]) -> None:
            mark_steps(given["run"].optimizers)

        watch(pretrain, pretrain_config(s, run), s, s.warmup + steps + 1, actions, prepare)
        trace = profile.trace()
    table = categories(trace, steps)
    total = sum(row["ms"] for row in table.values())
    if not total:
        assert rehearsing(), "the profiler saw no kernel"
        record(note="not checked: rehearsal, the profiler sees no kernel here")
        return
    for category, row in table.items():
        record(case=category, measures={"ours": row | {"share": row["ms"] / total}})
    record(case="all", measures={"ours": {"ms": total}}, fields={"longest": longest(trace, steps)})


@pytest.mark.parametrize("contender", CONTENDERS)
def test_gpu_step(contender, measuring, record, kernels_on_device):
    s = size(measuring)
    seen = CONTENDERS[contender](s)
    figures = seen.figures(training_flops_per_token(s.model, s.seq_len))
    fields = seen.fields(s)
    if contender == "ours":
        assert len(seen.losses(1)) == s.steps
        fields |= {"loss": seen.losses(10), "validation_loss": seen.metrics[-1]["validation_loss"]}
        figures["seconds_of_the_stage"] = seen.seconds
        for name, why in ABSENT.items():
            record(peer=name, missing=why)
    record({contender: seen.milliseconds}, "ms", measures={contender: figures}, fields=fields)

"""`fastlm plan`'s memory against PyTorch's caching allocator on the stand-in GPU.

One GPU, and one of several: a process group that sends nothing lets FSDP2 allocate what it would
with so many processes. (DistributedDataParallel crashes with it.)
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastlm.attention_backend import choose
from fastlm.config import PRESETS, ModelConfig, OptimConfig
from fastlm.model import Transformer, keep_what_fits
from fastlm.plan import memory
from fastlm.plan.cards import CARDS
from fastlm.plan.work import Way, Work
from fastlm.runtime import autocast, matmul_dtype
from fastlm.train import loop
from fastlm.train.optim import make_optimizers

BASE = PRESETS["modern-253m"]
ODD = replace(PRESETS["modern-124m"], tie_embeddings=False, qk_norm=True, qkv_bias=True)
LARGE = ModelConfig(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192)
ONE, FSDP = Way("one", 1, 1, 8), Way("fsdp", 8, 1, 8)
CASES = {
    "modern-253m": (Work(BASE, 32, 1024), ONE),
    "modern-253m, AdamW": (Work(BASE, 32, 1024, optimizer="adamw"), ONE),
    "modern-253m, accumulated": (Work(BASE, 16, 1024, passes=2), ONE),
    "modern-253m, recomputed": (Work(BASE, 32, 1024, recompute=True), ONE),
    "modern-253m, one row": (Work(BASE, 1, 1024), ONE),
    "untied, qk-norm, biases": (Work(ODD, 16, 1024), ONE),
    "smollm2-135m, grouped queries": (Work(PRESETS["smollm2-135m"], 8, 2048), ONE),
    "1b": (Work(LARGE, 8, 1024), ONE),
    "modern-253m, fsdp": (Work(BASE, 32, 1024), FSDP),
    "modern-253m, fsdp of 64": (Work(BASE, 32, 1024), Way("fsdp", 64, 1, 8)),
    "modern-253m, fsdp, recomputed": (Work(BASE, 32, 1024, recompute=True), FSDP),
    "modern-253m, fsdp, accumulated": (Work(BASE, 16, 1024, passes=2), FSDP),
    "1b, fsdp": (Work(LARGE, 8, 1024), FSDP),
}


@contextmanager
def processes(number: int) -> Iterator[None]:
    """Inside, this is the first of so many processes; what it sends goes nowhere."""
    if number == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class Loss(nn.Module):
    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.loss(tokens, tokens)


def shared_out(model: Transformer, way: Way) -> nn.Module:
    """The model's loss as a module, its parameters as they are in one of the way's GPUs."""
    loss = Loss(model)
    if way.mode == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        types = (torch.bfloat16, torch.float32)
        policy = MixedPrecisionPolicy(*types, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(loss, mp_policy=policy, reshard_after_forward=False)
    return loss


def measured(work: Work, way: Way) -> int:
    """The most bytes in use in the third step; with the optimizer where there is one GPU."""
    device = torch.device("cuda")
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # which the plan counts
    before = torch.cuda.memory_allocated()
    with processes(way.gpus):
        with torch.device(device):
            model = Transformer(work.config, checkpoint_activations=work.recompute)
        model.attention_backend = choose("auto", device, matmul_dtype(device), work.config).backend
        total = torch.cuda.get_device_properties(device).total_memory
        keep_what_fits(model, work.tokens, total, memory.ITEM)
        loss = shared_out(model, way)
        options = OptimConfig(name=work.optimizer)
        optimizers = make_optimizers(model, options) if way.gpus == 1 else []
        tokens = torch.zeros(work.rows, work.seq_len, dtype=torch.long, device=device)
        for number in range(3):
            torch.cuda.reset_peak_memory_stats()
            for _ in range(work.passes):
                with autocast(device):
                    total_loss = loss(tokens)
                total_loss.backward()
                del total_loss
            if optimizers:
                factor = loop.clip(model, 1.0).factor
                loop.step_all(optimizers, number, 3, options, factor, None)
            loss.zero_grad()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", CASES)
def test_memory_is_as_planned(name):
    work, way = CASES[name]
    moments = memory.moments(work, way, CARDS["h100"])
    if way.gpus > 1:  # the optimizer's state and its moment are not measured
        moments = {m: b | {"optimizer": 0} for m, b in moments.items() if m != "optimizer"}
    planned = max(sum(moment.values()) for moment in moments.values())
    found = measured(work, way)
    print(f"{name}: {planned / 2**30:.3f} GiB planned, {found / 2**30:.3f} measured")
    assert planned == pytest.approx(found, rel=0.02)

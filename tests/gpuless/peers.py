"""Training steps of modern-253m in other implementations, on the stand-in GPU.

    fakegpu PYTHON tests/gpuless/peers.py FILE plain|huggingface

plain: our model with its fused operations in plain PyTorch (bench/counted/compiled_step.py).
huggingface: transformers' Llama of the same shape. Each under torch.compile, bf16 autocast over
fp32 weights, clipping and fused AdamW, as common training loops have them. FILE gets the same
marks as from counted.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from counted import ROOT, so_far

sys.path.append(str(ROOT))

import fastlm.model
from fastlm.config import PRESETS, ModelConfig

ROWS, LENGTH, STEPS = 32, 1024, 4
Loss = Callable[[Tensor, Tensor], Tensor]


def plain(config: ModelConfig, device: torch.device) -> tuple[nn.Module, Loss]:
    """Our model with its fused operations replaced, from now on."""
    from bench.counted.compiled_step import plain_operations

    mock.patch.multiple(fastlm.kernels, **plain_operations()).start()
    model = fastlm.model.build(config, 0, device)
    return model, lambda ids, targets: model.loss(ids, targets) / targets.numel()


def huggingface(config: ModelConfig, device: torch.device) -> tuple[nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with device:
        model = LlamaForCausalLM(shape)
    return model, lambda ids, targets: model(input_ids=ids, labels=targets).loss


def steps(model: nn.Module, loss: Loss, config: ModelConfig, device: torch.device) -> list[dict]:
    """Some training steps, and the counts after each."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, fused=True)
    compiled = torch.compile(loss)
    ids = torch.randint(config.vocab_size, (ROWS, LENGTH), device=device)
    marks = []
    for _ in range(STEPS):
        with torch.autocast(device.type, torch.bfloat16):
            mean = compiled(ids, ids)
        mean.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append({"at": "step", **so_far()})
    return marks


def main(file: str, peer: str) -> None:
    device, config = torch.device("cuda"), PRESETS["modern-253m"]
    build = {"plain": plain, "huggingface": huggingface}[peer]
    marks = steps(*build(config, device), config, device)
    found = {"exit": 0, "marks": marks}
    Path(file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

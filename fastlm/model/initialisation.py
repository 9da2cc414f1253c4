"""The first weights of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlm.bigram import bigram_tables
from fastlm.config import ModelConfig
from fastlm.errors import check
from fastlm.model.transformer import Transformer


@torch.no_grad()
def initialise(model: Transformer, seed: int, text: Tensor | None = None) -> None:
    """Fill every parameter, the same on every device.

    Embedding and head: N(0, 0.02^2), or with text (n,) int64 the tables of its bigram model
    (fastlm/bigram.py), which needs an untied head; the padding rows 0. Matrices that read the
    residual stream (qkv, gate_up): N(0, 1 / fan_in). Matrices that write to it (out, down): 0, so
    that every block starts as the identity. Norm weights: 1. Biases: 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(weight: Tensor, std: float) -> None:
        weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=generator))

    for name, p in model.named_parameters():
        if name in ("embedding", "head"):
            normal(p, 0.02)
            p[model.config.vocab_size :] = 0  # the padding
        elif name.endswith("bias"):
            p.zero_()
        elif name.endswith("norm.weight"):
            p.fill_(1)
        elif name.endswith(("out.weight", "down.weight")):
            p.zero_()
        else:
            normal(p, p.shape[1] ** -0.5)
    if text is not None:
        c = model.config
        check(
            not c.tie_embeddings,
            "init bigram needs an untied head; pass --model.no-tie-embeddings, or --init normal",
        )
        embedding, head = bigram_tables(text, c.vocab_size, c.dim, generator)
        model.embedding[: c.vocab_size] = embedding
        model.head[: c.vocab_size] = head


def build(
    config: ModelConfig,
    seed: int,
    device: torch.device,
    text: Tensor | None = None,
    **options: Any,
) -> Transformer:
    """A freshly initialised model: text as in initialise(), options as in Transformer."""
    model = Transformer(config, **options)
    initialise(model, seed, text)
    return model.to(device)

"""The first weights of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlm.config import ModelConfig
from fastlm.model.transformer import Transformer

Initialiser = Callable[[Transformer, int], object]  # fills a model's parameters, given a seed


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> torch.Generator:
    """Fill every parameter, the same on every device.

    Embedding and head: N(0, 0.02^2), the padding rows 0. Matrices that read the residual stream
    (qkv, gate_up): N(0, 1 / fan_in). Matrices that write to it (out, down): 0, so that every block
    starts as the identity. Norm weights: 1. Biases: 0. Returns the generator, to draw more from.
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
    return generator


def build(
    config: ModelConfig,
    seed: int,
    device: torch.device,
    initialiser: Initialiser = initialise,
    **options: Any,
) -> Transformer:
    """A new model on the device; options as in Transformer."""
    model = Transformer(config, **options)
    initialiser(model, seed)
    return model.to(device)

"""A model for tests of the code around models."""

from __future__ import annotations

import torch

from fastlm.config import ModelConfig
from fastlm.model import Transformer, build


def randomised(config: ModelConfig) -> Transformer:
    """A model whose every weight matters (the real initialisation starts with zeros)."""
    model = build(config, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() == 1 else 0.2))
            if name in ("embedding", "head"):
                p[config.vocab_size :] = 0
    return model.eval()

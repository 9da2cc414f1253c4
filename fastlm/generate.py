"""Sampling text from a model."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from fastlm.config import GenerateConfig
from fastlm.load import open_model
from fastlm.model import Transformer, pick_device


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Tensor,
    n_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continue tokens (B, T) by n_tokens sampled ones; returns (B, T + n_tokens) int64 on the CPU.

    temperature 0 takes the likeliest token; top_p keeps the smallest set of tokens whose probability reaches it
    (Holtzman et al. 2020). The model sees the last max_seq_len tokens. The same seed gives the same text.
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.device
    for _ in range(n_tokens):
        seen = tokens[:, -model.config.max_seq_len :].to(device)
        logits = model.logits(seen)[:, -1].float().cpu()  # (B, V)
        tokens = torch.cat([tokens, choose(logits, temperature, top_p, generator)], dim=1)
    return tokens


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))


def write(cfg: GenerateConfig) -> int:
    """fastlm generate: print the prompt and its continuation."""
    model, tokenizer = open_model(cfg.model, pick_device(cfg.device))
    ids = tokenizer.encode(cfg.prompt) or [tokenizer.eos_id]
    out = generate(model, torch.tensor([ids]), cfg.tokens, cfg.temperature, cfg.top_p, cfg.seed)[0].tolist()
    new = out[len(ids) :]
    if tokenizer.eos_id in new:
        new = new[: new.index(tokenizer.eos_id)]
    sys.stdout.write(tokenizer.decode(ids + new) + "\n")
    return 0

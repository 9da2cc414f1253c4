"""Scores segments in each process of torchrun, each with another amount of free memory."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fastlm.config import ModelConfig
from fastlm.evaluation import score
from fastlm.evaluation.protocols import Segment
from fastlm.model import build

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=64, dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=16, max_seq_len=40
)


def nats() -> list[float]:
    """-log p of 17 segments of unlike lengths, by a model whose tokens are not all alike."""
    model = build(CONFIG, 0, CPU)
    segments = [Segment([n % 64, *range(n + 2)], 1, n) for n in range(17)]
    return score.segment_nats(model, segments, CPU).tolist()


if __name__ == "__main__":
    alone = nats()
    dist.init_process_group("gloo")
    fits = 20 if dist.get_rank() == 0 else 200
    score.tokens_that_fit = lambda model, device: fits
    together = nats()
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), rtol=1e-6), (alone, together)
    dist.destroy_process_group()

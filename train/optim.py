"""Optimizers: AdamW for embedding, head and norms; Muon (or AdamW) for the hidden matrices."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fastlm.config import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al., "Muon": slope at 0 as steep as five iterations bear


def orthogonalise(g: Tensor, iterations: int = 5) -> Tensor:
    """Roughly U V^T of each matrix's singular value decomposition U S V^T: g (..., m, n), m <= n is cheapest.

    X <- a X + (b A + c A A) X with A = X X^T, from X = g / |g|_F; singular values end within [0.7, 1.2].
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Momentum, orthogonalised: W <- W - lr (0.2 sqrt(max(m, n)) O + weight_decay W), O = orthogonalise(momentum).

    The factor 0.2 sqrt(max(m, n)) gives each update AdamW's usual root mean square, 0.2 (Liu et al. 2025, "Muon is
    scalable for LLM training", eq. 4), so one learning rate fits all shapes. Matrices of one shape are orthogonalised
    as one batch, in bf16 on a GPU and in fp32 on a CPU, where torch.optim.Muon's bf16 is 1.5 to 40 times slower (two
    Zen 1 cores, 256 x 768 to 1024 x 1024).
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self._step_one_shape(group, shape, params)

    def _step_one_shape(self, group: dict, shape: torch.Size, params: list[Tensor]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        updates = []
        for p in params:
            average = self.state[p].setdefault("momentum", torch.zeros_like(p))
            assert p.grad is not None
            average.lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(average, momentum))  # Nesterov
        batch = torch.stack(updates)
        update = orthogonalise(batch.bfloat16() if batch.is_cuda else batch)
        for p, u in zip(params, update, strict=True):
            p.mul_(1 - lr * group["weight_decay"]).add_(u, alpha=-lr * 0.2 * max(shape) ** 0.5)


def make_optimizers(model: nn.Module, o: OptimConfig) -> list[Optimizer]:
    """The optimizers of a model's parameters; each group remembers its peak learning rate as peak_lr."""
    parts: dict[str, list[Tensor]] = {"hidden": [], "embedding": [], "head": [], "vectors": []}
    for name, p in model.named_parameters():
        parts["vectors" if p.dim() == 1 else name if name in parts else "hidden"].append(p)
    rates = {"hidden": o.lr, "embedding": o.embedding_lr, "head": o.head_lr, "vectors": o.embedding_lr}
    groups: list[dict[str, Any]] = [
        {"params": params, "lr": rates[part], "weight_decay": 0.0 if part == "vectors" else o.weight_decay}
        for part, params in parts.items()
        if params and (part != "hidden" or o.name == "adamw")
    ]
    optimizers: list[Optimizer] = [AdamW(groups, betas=(o.beta1, o.beta2), eps=1e-8, fused=True)]
    if o.name == "muon":
        optimizers.insert(0, Muon(parts["hidden"], lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step: int, steps: int, o: OptimConfig) -> float:
    """The learning rate of step (0 <= step < steps) as a share of its peak.

    A linear rise over warmup_steps, then, with p the share of the remaining steps done:
    wsd: 1 until the last decay_fraction of all steps, then linear; linear: 1 - p; cosine: (1 + cos(pi p)) / 2; each
    scaled to end at min_lr_fraction. (WSD: Hu et al. 2024, MiniCPM, eq. 1, with a linear decay.)
    """
    if step < o.warmup_steps:
        return (step + 1) / o.warmup_steps
    after = steps - o.warmup_steps
    if o.schedule == "wsd":
        after = min(after, max(1, round(steps * o.decay_fraction)))
    left = min(1.0, (steps - step) / max(1, after))  # 1 at the start of the decay, 1/after at the last step
    if o.schedule == "cosine":
        left = (1 - torch.cos(torch.tensor(torch.pi * left, dtype=torch.float64)).item()) / 2
    return o.min_lr_fraction + (1 - o.min_lr_fraction) * left

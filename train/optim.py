"""Optimizers: AdamW for embedding, head and norms; Muon (or AdamW) for the hidden matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

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


class Groups:
    """Groups of parameters and each parameter's state, which is there from the start.

    Not torch.optim's class: making one imports torch._dynamo, 2.3 s and 76 MiB that a run without --compile has no use for
    (two slow cores).
    """

    def __init__(self, groups: list[dict[str, Any]], zeros_like: tuple[str, ...]):
        """groups: "params", and options with "lr". zeros_like: names of the state tensors that start as zeros."""
        self.groups = groups
        self.state = {p: {name: torch.zeros_like(p.detach()) for name in zeros_like} for g in groups for p in g["params"]}

    def zero_grad(self) -> None:
        for p in self.state:
            p.grad = None


class AdamW(Groups):
    """PyTorch's fused AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(self, groups: list[dict[str, Any]], beta1: float, beta2: float):
        super().__init__(groups, ("exp_avg", "exp_avg_sq"))
        self.beta1, self.beta2 = beta1, beta2
        for p, state in self.state.items():
            state["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            params = [p for p in group["params"] if p.grad is not None]
            averages, squares, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
            adamw(params, [p.grad for p in params], averages, squares, [], steps, fused=True, amsgrad=False, maximize=False,
                  beta1=self.beta1, beta2=self.beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=1e-8)  # fmt: skip


class Muon(Groups):
    """Momentum, orthogonalised: W <- W - lr (0.2 sqrt(max(m, n)) O + weight_decay W), O = orthogonalise(momentum).

    The factor 0.2 sqrt(max(m, n)) gives each update AdamW's usual root mean square, 0.2 (Liu et al. 2025, "Muon is
    scalable for LLM training", eq. 4), so one learning rate fits all shapes. Matrices of one shape are orthogonalised
    as one batch, in bf16 on a GPU and in fp32 on a CPU, where torch.optim.Muon's bf16 is 1.5 to 40 times slower (two
    Zen 1 cores, 256 x 768 to 1024 x 1024).
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float):
        super().__init__(groups, ("momentum",))
        self.momentum = momentum

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                self._step_one_shape(group, shape, params)

    def _step_one_shape(self, group: dict, shape: torch.Size, params: list[Tensor]) -> None:
        lr, updates = group["lr"], []
        for p in params:
            average = self.state[p]["momentum"]
            assert p.grad is not None
            average.lerp_(p.grad, 1 - self.momentum)
            updates.append(p.grad.lerp(average, self.momentum))  # Nesterov
        batch = torch.stack(updates)
        update = orthogonalise(batch.bfloat16() if batch.is_cuda else batch)
        for p, u in zip(params, update, strict=True):
            p.mul_(1 - lr * group["weight_decay"]).add_(u, alpha=-lr * 0.2 * max(shape) ** 0.5)


Optimizer = AdamW | Muon


def make_optimizers(model: nn.Module, o: OptimConfig) -> list[Optimizer]:
    """The optimizers of a model's parameters; each group remembers its peak learning rate as peak_lr."""
    parts: dict[str, list[Tensor]] = {"hidden": [], "embedding": [], "head": [], "vectors": []}
    for name, p in model.named_parameters():
        parts["vectors" if p.dim() == 1 else name if name in parts else "hidden"].append(p)
    rates = {"hidden": o.lr, "embedding": o.embedding_lr, "head": o.head_lr, "vectors": o.embedding_lr}
    groups = {
        part: {"params": params, "lr": rates[part], "peak_lr": rates[part],
               "weight_decay": 0.0 if part == "vectors" else o.weight_decay}
        for part, params in parts.items() if params
    }  # fmt: skip
    optimizers: list[Optimizer] = [Muon([groups.pop("hidden")], o.momentum)] if o.name == "muon" else []
    return [*optimizers, AdamW(list(groups.values()), o.beta1, o.beta2)]


def named_state(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Every tensor of the optimizers' states as optimizer.parameter.name (learning rates follow from the step)."""
    return {
        f"{i}.{index}.{name}": tensor
        for i, optimizer in enumerate(optimizers)
        for index, state in enumerate(optimizer.state.values())
        for name, tensor in state.items()
    }


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

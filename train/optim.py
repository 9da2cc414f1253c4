"""Optimizers: AdamW for embedding, head and norms; Muon (or AdamW) for the hidden matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.config import OptimConfig
from fastlm.kernels import updates
from fastlm.parts import local
from fastlm.train import parallel

# Of x -> a x + b x^3 + c x^5, one after the other, which bring (0.001, 1] closest to 1 (Amsel et
# al. 2025, "The Polar Express", algorithm 1), each for a spectrum that rounding may have made 1%
# too large.
POLAR_EXPRESS = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)
RESTART = 2  # iterations after which 16-bit arithmetic needs the Gram matrix afresh


def orthogonalise(stacks: list[Tensor]) -> list[Tensor]:
    """Roughly U V^T of each matrix's singular value decomposition U S V^T.

    The stacks themselves may be overwritten.

    stacks: (L, m, n) each, of matrices whose Frobenius norm is at most 1, fp16 or wider. X <- P X
    with P = a I + b A + c A A and A = X X^T, five times. Of the whole product X is a factor only at
    the end: P and the next A = P A P are as small as m x m (here m <= n), and stacks with the same
    m share their matmuls. In 16 bits an A made of an A grows eigenvalues below zero, so X and A are
    made after RESTART iterations too. Against iterations on X: 3.1 instead of 4.6 TFLOP at
    modern-253m. Sources: Jordan et al. 2024, "Muon"; Zhang, Amsel, Chen and Dao 2026, "Gram
    Newton-Schulz".
    """
    by_side: dict[int, list[int]] = defaultdict(list)
    for index, x in enumerate(stacks):
        by_side[min(x.shape[-2:])].append(index)
    done = list(stacks)
    for indices in by_side.values():
        for index, x in zip(
            indices, _orthogonalise_same_side([stacks[i] for i in indices]), strict=True
        ):
            done[index] = x
    return done


def _orthogonalise_same_side(xs: list[Tensor]) -> list[Tensor]:
    side = min(xs[0].shape[-2:])
    counts = [len(x) for x in xs]
    others = [torch.empty_like(x) for x in xs]
    gram = xs[0].new_empty(sum(counts), side, side)
    parts = (
        (POLAR_EXPRESS[:RESTART], POLAR_EXPRESS[RESTART:])
        if gram.dtype.itemsize == 2
        else (POLAR_EXPRESS,)
    )
    for part in parts:
        for x, a in zip(xs, gram.split(counts), strict=True):
            torch.bmm(x.mT, x, out=a) if tall(x) else torch.bmm(x, x.mT, out=a)
        product = polynomials(gram, part)
        for x, p, y in zip(xs, product.split(counts), others, strict=True):
            torch.bmm(x, p.mT, out=y) if tall(x) else torch.bmm(p, x, out=y)
        xs, others = others, xs
    return xs


def tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def polynomials(gram: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """The product of P = a I + b A + c A A over the coefficients.

    A (L, m, m) is first gram, then P A P each time.
    """
    product = None
    for index, (a, b, c) in enumerate(coefficients):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else torch.bmm(p, product)
        if index + 1 < len(coefficients):
            gram = torch.bmm(torch.bmm(p, gram), p)
    assert product is not None
    return product


def normalised(stack: Tensor) -> Tensor:
    """Matrices (L, m, n) with a Frobenius norm of 1, of what momentum_step() left as it was.

    bf16 in the place of fp16.
    """
    x = stack.view(torch.bfloat16) if stack.dtype == torch.float16 else stack
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    return (x / norms.clamp_min(1e-7)).to(stack.dtype)


class Groups:
    """Groups of parameters and each parameter's state, which is there from the start.

    Not torch.optim's class: making one imports torch._dynamo, 2.3 s and 76 MiB that a run without
    --compile has no use for (two slow cores).

    step() of both optimizers: share of the learning rates; factor, a number on the device that
    every gradient is multiplied by; skip, another: where it is not 0 the step is left out. The host
    waits for neither.
    """

    def __init__(self, groups: list[dict[str, Any]], zeros_like: tuple[str, ...]):
        """groups: "params", "lr", "weight_decay".

        zeros_like: names of the state tensors that start as zeros.
        """
        self.groups = groups
        self.state = {
            p: {name: torch.zeros_like(p.detach()) for name in zeros_like}
            for g in groups
            for p in g["params"]
        }

    def zero_grad(self) -> None:
        for p in self.state:
            p.grad = None


class AdamW(Groups):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) with eps 1e-8.

    On a GPU one launch for all parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], beta1: float, beta2: float):
        super().__init__(groups, ("exp_avg", "exp_avg_sq"))
        self.betas = beta1, beta2
        for p, state in self.state.items():
            state["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(
        self, share: float = 1.0, factor: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        tensors = updates.AdamWTensors([], [], [], [], [])
        rates = []
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    tensors.parameters.append(local(p))
                    tensors.grads.append(local(p.grad))
                    tensors.averages.append(local(state["exp_avg"]))
                    tensors.squares.append(local(state["exp_avg_sq"]))
                    tensors.steps.append(state["step"])
                    rates.append(updates.Rate(group["lr"], group["weight_decay"]))
        if rates:
            updates.adamw_step(tensors, rates, share, self.betas, factor, skip)


class Muon(Groups):
    """Momentum, orthogonalised: W <- W - lr (0.2 sqrt(max(m, n)) O + weight_decay W), O =
    orthogonalise(momentum).

    The factor 0.2 sqrt(max(m, n)) gives each update AdamW's usual root mean square, 0.2 (Liu et al.
    2025, "Muon is scalable for LLM training", eq. 4), so one learning rate fits all shapes.
    Matrices of one shape are orthogonalised as one batch, in fp16 on a GPU (closer to exact than
    bf16 at the same speed: their entries are small, their range known) and in fp32 on a CPU, where
    torch.optim.Muon's bf16 is 1.5 to 40 times slower (two Zen 1 cores, 256 x 768 to 1024 x 1024).
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float):
        super().__init__(groups, ("momentum",))
        self.momentum = momentum

    @torch.no_grad()
    def step(
        self, share: float = 1.0, factor: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        for group in self.groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            if not by_shape:
                continue
            params = [p for alike in by_shape.values() for p in alike]
            parts = [local(p) for p in params]
            grads = [local(p.grad) for p in params if p.grad is not None]
            averages = [local(self.state[p]["momentum"]) for p in params]
            firsts = [alike[0] for alike in by_shape.values()]
            dtype = updates.update_dtype(parts[0])
            stacks = [
                local(p).new_empty(len(alike), *local(p).shape, dtype=dtype)
                for p, alike in zip(firsts, by_shape.values(), strict=True)
            ]
            directions = [direction for stack in stacks for direction in stack]
            sharded = firsts[0] is not parts[0]
            updates.momentum_step(
                grads, averages, directions, self.momentum, factor, skip, normalise=not sharded
            )

            def work(whole: list[Tensor], sharded: bool = sharded) -> list[Tensor]:
                return orthogonalise([normalised(stack) for stack in whole] if sharded else whole)

            done = parallel.each_matrix_once(stacks, firsts, work)
            steps = [step for stack in done for step in stack]
            scales = [0.2 * max(p.shape) ** 0.5 for p in params]
            updates.muon_step(
                parts, steps, scales, share * group["lr"], group["weight_decay"], skip
            )


Optimizer = AdamW | Muon


def make_optimizers(model: nn.Module, o: OptimConfig) -> list[Optimizer]:
    """The optimizers of a model's parameters, at their peak learning rates."""
    parts: dict[str, list[Tensor]] = {"hidden": [], "embedding": [], "head": [], "vectors": []}
    for name, p in model.named_parameters():
        parts["vectors" if p.dim() == 1 else name if name in parts else "hidden"].append(p)
    rates = {
        "hidden": o.lr,
        "embedding": o.embedding_lr,
        "head": o.head_lr,
        "vectors": o.embedding_lr,
    }
    groups = {
        part: {
            "params": params,
            "lr": rates[part],
            "weight_decay": 0.0 if part == "vectors" else o.weight_decay,
        }
        for part, params in parts.items()
        if params
    }
    optimizers: list[Optimizer] = (
        [Muon([groups.pop("hidden")], o.momentum)] if o.name == "muon" else []
    )
    return [*optimizers, AdamW(list(groups.values()), o.beta1, o.beta2)]


def named_state(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Every tensor of the optimizers' states by parameter and kind, such as
    blocks.3.qkv.weight.momentum.

    A parameter belongs to one optimizer. Learning rates follow from the step.
    """
    state = {p: tensors for optimizer in optimizers for p, tensors in optimizer.state.items()}
    return {
        f"{name}.{kind}": tensor
        for name, p in model.named_parameters()
        for kind, tensor in state.get(p, {}).items()
    }


def schedule(step: int, steps: int, o: OptimConfig) -> float:
    """The learning rate of step (0 <= step < steps) as a share of its peak.

    A linear rise over warmup_steps, then, with p the share of the remaining steps done: wsd: 1
    until the last decay_fraction of all steps, then linear; linear: 1 - p; cosine: (1 + cos(pi p))
    / 2; each scaled to end at min_lr_fraction. (WSD: Hu et al. 2024, MiniCPM, eq. 1, with a linear
    decay.)
    """
    if step < o.warmup_steps:
        return (step + 1) / o.warmup_steps
    after = steps - o.warmup_steps
    if o.schedule == "wsd":
        after = min(after, max(1, round(steps * o.decay_fraction)))
    left = min(
        1.0, (steps - step) / max(1, after)
    )  # 1 at the start of the decay, 1/after at the last step
    if o.schedule == "cosine":
        left = (1 - torch.cos(torch.tensor(torch.pi * left, dtype=torch.float64)).item()) / 2
    return o.min_lr_fraction + (1 - o.min_lr_fraction) * left

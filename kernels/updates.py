"""What an optimizer does to all its tensors at once: a pass over a list of them is one launch.

    global norm     norm = sqrt(sum over all g of |g|^2) / scale,
                    factor = min(1, max_norm / (norm + 1e-6)) / scale
    Muon, momentum  m <- m + (1 - mu) (factor g - m),   u = factor g + mu (m - factor g),
                    x = u / max(|u|_F, 1e-7)
    Muon, update    p <- (1 - lr decay) p - lr k x,   k = 0.2 sqrt(max(rows, columns)) of the matrix
    AdamW           p <- (1 - lr decay) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps),
                    m and v of factor g

PyTorch's own passes over lists take a launch for every 21 million elements and each reads and
writes what the one before left. Here the gradients are read once for their norm and once for the
step: nothing is written back to them. factor is a number on the device and so is skip (the step is
left out where it is not 0): the host waits for neither. Floors, bytes an element: PASSES in
triton/updates.py. On a CPU the optimizers run PyTorch's functions.
Sources: Pascanu et al. 2013 (clipping); Jordan et al. 2024, "Muon"; Liu et al. 2025, "Muon is
scalable for LLM training", eq. 4 (k); Loshchilov and Hutter 2019, algorithm 2 (AdamW).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fastlm.kernels.common import takes_triton

EPS = 1e-8  # of AdamW


class AdamWTensors(NamedTuple):
    """The tensors of an AdamW step, parameter by parameter: steps are single numbers in fp32."""

    parameters: list[Tensor]
    grads: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]


class Rate(NamedTuple):
    """A parameter's learning rate and weight decay."""

    lr: float
    decay: float


def global_norm(grads: list[Tensor], max_norm: float, scale: Tensor | None = None) -> Tensor:
    """(norm, factor, 1 where the norm is not finite and else 0) of the gradients.

    scale: how many times too large they are, None for 1.
    """
    if takes_triton(grads[0]):
        from fastlm.kernels.triton import updates as on_gpu

        return on_gpu.global_norm(grads, max_norm, scale)
    norm = nn.utils.get_total_norm(grads)
    if scale is not None:
        norm = norm / scale
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if scale is not None:
        factor = factor / scale
    return torch.stack([norm, factor, (~norm.isfinite()).to(norm.dtype)])


def _scale_in_place(grads: list[Tensor], factor: Tensor | None) -> None:
    """A CPU's pass over the gradients, where it changes anything.

    On a CPU to look at the factor is to wait for nothing.
    """
    if factor is not None and factor != 1:
        torch._foreach_mul_(grads, factor)


def update_dtype(parameter: Tensor) -> torch.dtype:
    """What Muon's updates are made in."""
    return torch.float16 if takes_triton(parameter) else parameter.dtype


def momentum_step(
    grads: list[Tensor],
    averages: list[Tensor],
    updates: list[Tensor],
    momentum: float,
    factor: Tensor | None = None,
    skip: Tensor | None = None,
    normalise: bool = True,
) -> None:
    """Muon's momentum, and into updates, of update_dtype, each matrix's direction.

    It has a Frobenius norm of 1. normalise: else the directions keep their norms, and what stands
    in an fp16 tensor is bf16, which has their range.
    """
    if takes_triton(grads[0]):
        from fastlm.kernels.triton import updates as on_gpu

        lists = {"grads": grads, "averages": averages, "updates": updates}
        on_gpu.momentum_step(lists, momentum, factor, skip, normalise)
    elif skip is None or not skip:
        _scale_in_place(grads, factor)
        for grad, average, update in zip(grads, averages, updates, strict=True):
            average.lerp_(grad, 1 - momentum)
            torch.lerp(grad, average, momentum, out=update)
            if normalise:
                update.div_(update.norm().clamp_min(1e-7))


def muon_step(
    parameters: list[Tensor],
    updates: list[Tensor],
    scales: list[float],
    lr: float,
    decay: float,
    skip: Tensor | None = None,
) -> None:
    """Weight decay, and each parameter's step along its update (of update_dtype) by its scale."""
    if takes_triton(parameters[0]):
        from fastlm.kernels.triton import updates as on_gpu

        on_gpu.muon_step(parameters, updates, scales, lr, decay, skip)
    elif skip is None or not skip:
        for parameter, update, scale in zip(parameters, updates, scales, strict=True):
            parameter.mul_(1 - lr * decay).add_(update, alpha=-lr * scale)


def adamw_step(
    tensors: AdamWTensors,
    rates: list[Rate],
    share: float,
    betas: tuple[float, float],
    factor: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """AdamW's step, by a share of each parameter's learning rate."""
    if takes_triton(tensors.parameters[0]):
        from fastlm.kernels.triton import updates as on_gpu

        flat = tuple(number for rate in rates for number in rate)
        on_gpu.adamw_step(tensors._asdict(), flat, share, betas, EPS, factor, skip)
        return
    _scale_in_place(tensors.grads, factor)
    for rate in dict.fromkeys(rates):
        alike = [index for index, other in enumerate(rates) if other == rate]
        of_rate = ([part[index] for index in alike] for part in tensors)
        parameters, grads, averages, squares, steps = of_rate
        adamw(
            parameters,
            grads,
            averages,
            squares,
            [],
            steps,
            fused=True,
            found_inf=skip,
            amsgrad=False,
            maximize=False,
            lr=share * rate.lr,
            weight_decay=rate.decay,
            beta1=betas[0],
            beta2=betas[1],
            eps=EPS,
        )

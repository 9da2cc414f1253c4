"""Loss scaling for fp16 matmuls, in which gradients below 6e-8 would be zero.

The loss is differentiated scale times too large, and the optimizers divide what they read by scale.
A step whose gradients are not finite is left out, and scale halves; after GROWTH_STEPS good steps
it doubles. Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.2.

Both numbers live on the device, so that no step waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

START = 2.0**16
GROWTH_STEPS = 2000


@dataclass(frozen=True)
class LossScale:
    """scale: by which the loss is multiplied; good_steps: since it last changed. fp32 scalars."""

    scale: Tensor
    good_steps: Tensor

    def update(self, found_inf: Tensor) -> None:
        """After a step; found_inf: not 0 where its gradients were not finite."""
        bad = found_inf != 0
        counted = self.good_steps + 1
        full = counted >= GROWTH_STEPS
        factor = torch.where(bad, 0.5, torch.where(full, 2.0, 1.0))
        self.scale.mul_(factor)
        self.good_steps.copy_(torch.where(bad | full, 0.0, counted))

    def values(self) -> list[float]:
        """For a checkpoint, from which loss_scale() goes on."""
        return [self.scale.item(), self.good_steps.item()]


def loss_scale(device: torch.device, values: list[float] | None = None) -> LossScale:
    """A new loss scale, or the one that had these values()."""
    scale, good_steps = values or [START, 0.0]
    return LossScale(torch.tensor(scale, device=device), torch.tensor(good_steps, device=device))

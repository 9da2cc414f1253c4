"""Preference losses on the log-probabilities of two answers, and the table that `fastlm dpo` reads.

In each: policy, reference (B, 2), nats, log pi(y | x) of the chosen and of the rejected answer,
summed over its tokens, by the model in training and by the one it started from; lengths (B, 2),
their counted tokens. Returns the loss of each pair (B,) and the rewards (B, 2) whose difference the
loss looks at.

A new loss is a function and a row of LOSSES here, and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.config import DpoConfig

LossAndRewards = tuple[Tensor, Tensor]


def dpo(
    policy: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0
) -> LossAndRewards:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), m = r_chosen - r_rejected.

    r = beta (policy - reference). Source: Rafailov et al. 2023, Direct Preference Optimization,
    eq. 7; with e = label_smoothing, the chance that a pair is the wrong way round, conservative DPO
    (Mitchell 2023, A note on DPO with noisy preferences, eq. 3).
    """
    rewards = beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    right = -(1 - label_smoothing) * F.logsigmoid(margin)
    wrong = -label_smoothing * F.logsigmoid(-margin)
    return right + wrong, rewards


def ipo(policy: Tensor, reference: Tensor, beta: float) -> LossAndRewards:
    """(h - 1 / (2 beta))^2, h = (policy - reference) of the chosen minus the rejected answer.

    Source: Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human
    Preferences, eq. 17.
    """
    gain = policy - reference
    return (gain[:, 0] - gain[:, 1] - 1 / (2 * beta)).square(), beta * gain


def length_normalised(
    policy: Tensor, reference: Tensor, lengths: Tensor, beta: float, label_smoothing: float = 0.0
) -> LossAndRewards:
    """dpo() of log-probabilities per token: r = beta (policy - reference) / lengths.

    Source: Lambert et al. 2024, Tulu 3, eq. 6.
    """
    return dpo(policy / lengths, reference / lengths, beta, label_smoothing)


def simpo(policy: Tensor, lengths: Tensor, beta: float, margin: float) -> LossAndRewards:
    """-log sigmoid(m - margin), r = beta policy / lengths: no reference.

    Source: Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward,
    eq. 6.
    """
    rewards = beta * policy / lengths
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - margin), rewards


@dataclass(frozen=True)
class Pairs:
    """What a loss may look at; shapes and units as at the top of this file."""

    policy: Tensor
    reference: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """A row of the table: the loss of some pairs with a run's options, and what else it needs."""

    of: Callable[[Pairs, DpoConfig], LossAndRewards]
    needs_reference: bool = True
    takes_smoothing: bool = False


LOSSES = {
    "sigmoid": PreferenceLoss(
        lambda p, o: dpo(p.policy, p.reference, o.beta, o.label_smoothing),
        takes_smoothing=True,
    ),
    "ipo": PreferenceLoss(lambda p, o: ipo(p.policy, p.reference, o.beta)),
    "length-normalised": PreferenceLoss(
        lambda p, o: length_normalised(p.policy, p.reference, p.lengths, o.beta, o.label_smoothing),
        takes_smoothing=True,
    ),
    "simpo": PreferenceLoss(
        lambda p, o: simpo(p.policy, p.lengths, o.beta, o.margin),
        needs_reference=False,
    ),
}


def sum_per_answer(per_token: Tensor, member: Tensor) -> Tensor:
    """Sums over each answer's counted tokens, (pairs, 2).

    per_token (N,); member as membership() gives it, of 2 pairs answers. A matmul and not a scatter,
    so that the order of addition is the same on every run.
    """
    return (member @ per_token).view(-1, 2)


def membership(unit: Tensor, units: int) -> Tensor:
    """Which tokens belong to which answer: 1 where they do, else 0, (units, N) fp32.

    unit (...), N numbers in all: of each counted token's answer, -1 elsewhere. units: answers.
    """
    return (unit.flatten() == torch.arange(units, device=unit.device)[:, None]).float()

"""Preference losses against their closed forms, in float64 and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastlm.config import DpoConfig
from fastlm.train import losses

POLICY = torch.tensor([[-10.0, -12.0], [-30.0, -8.0], [-5.5, -5.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11.0, -11.5], [-25.0, -9.0], [-5.5, -5.5]], dtype=torch.float64)
LENGTHS = torch.tensor([[4.0, 5.0], [10.0, 2.0], [3.0, 3.0]], dtype=torch.float64)


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def by_hand(kind: str, beta: float, smoothing: float = 0.0, margin: float = 0.0) -> list[float]:
    found = []
    for p, r, n in zip(POLICY.tolist(), REFERENCE.tolist(), LENGTHS.tolist(), strict=True):
        if kind == "simpo":
            found.append(minus_log_sigmoid(beta * (p[0] / n[0] - p[1] / n[1]) - margin))
            continue
        scale = n if kind == "length-normalised" else (1.0, 1.0)
        h = (p[0] - r[0]) / scale[0] - (p[1] - r[1]) / scale[1]
        if kind == "ipo":
            found.append((h - 1 / (2 * beta)) ** 2)
        else:
            found.append(
                (1 - smoothing) * minus_log_sigmoid(beta * h)
                + smoothing * minus_log_sigmoid(-beta * h)
            )
    return found


@pytest.mark.parametrize("beta", [0.1, 2.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_every_loss_equals_its_closed_form(beta, smoothing):
    pairs = losses.Pairs(POLICY, REFERENCE, LENGTHS)
    for kind, loss in losses.LOSSES.items():
        epsilon = smoothing if loss.takes_smoothing else 0.0
        options = DpoConfig(loss=kind, beta=beta, label_smoothing=epsilon, margin=0.7)
        expected = torch.tensor(by_hand(kind, beta, epsilon, 0.7), dtype=torch.float64)
        torch.testing.assert_close(loss.of(pairs, options)[0], expected, rtol=1e-12, atol=0)


def test_rewards_are_what_the_loss_compares():
    torch.testing.assert_close(losses.dpo(POLICY, REFERENCE, 0.5)[1], 0.5 * (POLICY - REFERENCE))
    torch.testing.assert_close(losses.ipo(POLICY, REFERENCE, 0.5)[1], 0.5 * (POLICY - REFERENCE))
    torch.testing.assert_close(losses.simpo(POLICY, LENGTHS, 2.0, 0.5)[1], 2 * POLICY / LENGTHS)


def test_at_the_reference_the_loss_is_ln_2_exactly_in_fp32_and_pulls_the_answers_apart():
    policy = REFERENCE.float().requires_grad_()
    loss, rewards = losses.dpo(policy, REFERENCE.float(), 0.1)
    assert torch.equal(loss, torch.full((3,), math.log(2)))
    assert rewards.abs().max() == 0
    loss.sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([[-0.05, 0.05]] * 3))


def test_losses_are_finite_and_right_where_margins_are_huge():
    policy = torch.tensor([[-1.0, -1e5], [-1e5, -1.0]])
    loss = losses.dpo(policy, torch.zeros(2, 2), 1.0)[0]
    torch.testing.assert_close(loss, torch.tensor([0.0, 1e5 - 1]))


def test_answers_sum_over_their_own_tokens():
    unit = torch.tensor([[-1, 0, 0, 1], [-1, 2, 3, 3]])
    member = losses.membership(unit, 4)
    per_token = torch.tensor([9.0, 1, 2, 4, 9, 8, 16, 32])
    assert losses.sum_per_answer(per_token, member).tolist() == [[3, 4], [8, 48]]
    assert member.sum(1).tolist() == [2, 1, 1, 2]

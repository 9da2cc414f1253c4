"""The optimizers' passes over lists, on the Triton kernels and on what a CPU does instead, against
float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastlm.kernels import updates
from fastlm.kernels.audit.traffic import counting
from fastlm.kernels.triton.updates import BLOCK, PASSES

# One element, less than a block, one that ends a block, one that starts another, odd rows; one of
# them not aligned.
SHAPES = [(1,), (7,), (64, 64), (1, BLOCK + 1), (33, 129), (100, 50)]
MATRICES = [shape for shape in SHAPES if len(shape) == 2]
factors = pytest.mark.parametrize("factor", [None, 1.0, 0.3])


def some(shapes: list[tuple[int, ...]], device: torch.device, scale: float = 1.0) -> list[Tensor]:
    return [scale * torch.randn(shape, device=device) for shape in shapes]


def number(value: float | None, device: torch.device) -> Tensor | None:
    return None if value is None else torch.tensor(value, device=device)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def close(found: Tensor, truth: Tensor, relative: float = 2e-6) -> None:
    assert (found.double() - truth).norm() <= relative * truth.norm() + 1e-12


@pytest.mark.parametrize("max_norm", [math.inf, 1.0, 1e6])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_norm_and_the_factor_are_those_of_clip_grad_norm(max_norm, scale, device):
    grads = some(SHAPES, device, scale or 1.0)
    before = copies(grads)
    norm, factor, bad = updates.global_norm(grads, max_norm, number(scale, device))
    truth = torch.cat([g.double().flatten() for g in grads]).norm() / (scale or 1.0)
    close(norm, truth, 3e-7)
    close(factor, min(max_norm / (truth + 1e-6), torch.tensor(1.0).double()) / (scale or 1.0), 3e-7)
    assert bad == 0
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    assert torch.equal(updates.global_norm(grads, max_norm, number(scale, device))[0], norm)


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
def test_one_gradient_that_is_not_finite_is_found(wrong, device):
    grads = some(SHAPES, device)
    grads[4][32, 128] = wrong
    norm, _, bad = updates.global_norm(grads, 1.0)
    assert not norm.isfinite()
    assert bad == 1


def test_gradients_of_zero_stay_zero(device):
    found = updates.global_norm([torch.zeros(5, device=device)], 1.0)
    assert found.tolist() == [0, 1, 0]


@factors
def test_momentum_and_direction(factor, device):
    grads, averages = some(MATRICES, device, 1e-3), some(MATRICES, device, 1e-3)
    averages[0].zero_()
    grads[0].zero_()
    kept = copies(averages)
    directions = [torch.empty_like(g, dtype=updates.update_dtype(g)) for g in grads]
    truths = [(factor or 1.0) * g.double() for g in grads]
    updates.momentum_step(grads, averages, directions, 0.95, number(factor, device))
    for g, old, m, x in zip(truths, kept, averages, directions, strict=True):
        truth = old.double() + 0.05 * (g - old.double())
        close(m, truth)
        u = g + 0.95 * (truth - g)
        close(
            x, u / u.norm().clamp_min(1e-7), 2e-6 if x.dtype == torch.float32 else 3e-3
        )  # half a digit of bf16


def test_gradients_too_small_for_fp16_have_a_direction(device):
    grads, averages = some(MATRICES, device, 1e-7), some(MATRICES, device, 0.0)
    directions = [torch.empty_like(g, dtype=updates.update_dtype(g)) for g in grads]
    updates.momentum_step(grads, averages, directions, 0.95)
    for g, x in zip(grads, directions, strict=True):
        u = g.double() * (1 - 0.95**2)
        close(x, u / max(1e-7, u.norm()), 3e-3)


def test_muon_s_step(device):
    parameters = some(MATRICES, device)
    steps = [x.to(updates.update_dtype(x)) for x in some(MATRICES, device, 0.1)]
    before = copies(parameters)
    scales = [0.2 * max(shape) ** 0.5 for shape in MATRICES]
    updates.muon_step(parameters, steps, scales, 0.02, 0.1)
    for p, old, x, scale in zip(parameters, before, steps, scales, strict=True):
        close(p, (1 - 0.02 * 0.1) * old.double() - 0.02 * scale * x.double())


@factors
def test_adamw_s_steps(factor, device):
    """Ten steps, each by another share of the learning rate.

    Every tensor has its own rate and decay.
    """
    parameters = some(SHAPES, device)
    rates = [updates.Rate(0.01 * (i + 1), 0.1 * (i % 2)) for i in range(len(SHAPES))]
    truth = [p.double() for p in parameters]
    m, v = ([torch.zeros_like(p) for p in truth] for _ in range(2))
    zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    counts = [torch.zeros((), device=device) for _ in parameters]
    for step in range(1, 11):
        grads = some(SHAPES, device, 1e-2)
        for i, g in enumerate(copies(grads)):
            g, lr = g.double() * (factor or 1.0), rates[i].lr / step
            m[i] = 0.9 * m[i] + (1 - 0.9) * g
            v[i] = 0.999 * v[i] + (1 - 0.999) * g * g
            ahead = m[i] / (1 - 0.9**step) / ((v[i] / (1 - 0.999**step)).sqrt() + 1e-8)
            truth[i] = truth[i] * (1 - lr * rates[i].decay) - lr * ahead
        tensors = updates.AdamWTensors(parameters, grads, *zeros, counts)
        updates.adamw_step(tensors, rates, 1 / step, (0.9, 0.999), number(factor, device))
    for p, t in zip(parameters, truth, strict=True):
        close(p, t)
    assert [count.item() for count in counts] == [10] * len(SHAPES)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95, 0.999, 0.9999])
@pytest.mark.usefixtures("triton_only")
def test_the_corrections_of_the_averages_have_fp32_s_precision(beta, device):
    """A constant gradient of 1 makes every step of AdamW one learning rate long, however few or
    many came before.
    """
    for count in (0, 1, 2, 10, 100, 1000, 100_000):
        before = 1 - beta**count
        filled = [[torch.full((1,), before, device=device)] for _ in range(2)]
        tensors = updates.AdamWTensors(
            [torch.zeros(1, device=device)],
            [torch.ones(1, device=device)],
            *filled,
            [torch.tensor(float(count), device=device)],
        )
        updates.adamw_step(tensors, [updates.Rate(1.0, 0.0)], 1.0, (beta, beta))
        assert tensors.parameters[0].item() == pytest.approx(
            -1, rel=2e-4 if before < 0.01 and count else 5e-6
        )


def test_a_step_left_out_changes_nothing(device):
    """Gradients that are not finite included."""
    everything = {
        name: some(MATRICES, device) for name in ("parameters", "grads", "averages", "squares")
    }
    everything["steps"] = [torch.tensor(3.0, device=device) for _ in MATRICES]
    everything["grads"][0][0, 0] = math.nan
    before = {name: copies(tensors) for name, tensors in everything.items()}
    skip = torch.tensor(1.0, device=device)
    updates.adamw_step(
        updates.AdamWTensors(**everything),
        [updates.Rate(0.1, 0.1)] * len(MATRICES),
        1.0,
        (0.9, 0.99),
        None,
        skip,
    )
    directions = [torch.zeros_like(g, dtype=updates.update_dtype(g)) for g in everything["grads"]]
    updates.momentum_step(everything["grads"], everything["averages"], directions, 0.95, None, skip)
    updates.muon_step(everything["parameters"], directions, [1.0] * len(MATRICES), 0.1, 0.1, skip)
    for name, tensors in everything.items():
        for a, b in zip(tensors, before[name], strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name


def test_a_step_not_left_out_is_taken(device):
    zero, parameters = torch.tensor(0.0, device=device), some(MATRICES, device)
    steps = [torch.ones_like(p, dtype=updates.update_dtype(p)) for p in parameters]
    before = copies(parameters)
    updates.muon_step(parameters, steps, [1.0] * len(MATRICES), 0.5, 0.0, zero)
    for p, old in zip(parameters, before, strict=True):
        close(p, old.double() - 0.5)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels are compiled, and nothing is counted"
)
@pytest.mark.usefixtures("triton_only")
def test_every_element_is_read_and_written_once(device):
    """Within 1.5% of PASSES, tables and partial sums counted.

    Lists of a large model's sizes have as little of them.
    """
    shapes = [(128, 512), (64, 64), (256, 128)]
    elements = sum(rows * columns for rows, columns in shapes)
    a, b, c, d = (some(shapes, device) for _ in range(4))
    half = [x.half() for x in a]
    steps = [torch.zeros((), device=device) for _ in shapes]
    rates = [updates.Rate(0.1, 0.1)] * len(shapes)
    expected = {
        ("squares_kernel",): lambda: updates.global_norm(a, 1.0),
        ("momentum_kernel", "normalise_kernel"): lambda: updates.momentum_step(a, b, half, 0.95),
        ("muon_kernel",): lambda: updates.muon_step(a, half, [1.0] * len(shapes), 0.1, 0.1),
        ("adamw_kernel",): lambda: updates.adamw_step(
            updates.AdamWTensors(a, b, c, d, steps), rates, 1.0, (0.9, 0.99)
        ),
    }
    for kernels, call in expected.items():
        with counting() as meter:
            call()
        floor = sum(PASSES[kernel] for kernel in kernels) * elements
        assert floor <= meter.streamed <= 1.015 * floor, kernels

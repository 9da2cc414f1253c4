"""Muon against torch.optim.Muon and the singular value decomposition, AdamW's groups, the schedules
against their formulas.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastlm.config import ModelConfig, OptimConfig
from fastlm.kernels.common import triton_on_cpu
from fastlm.model import build
from fastlm.train import loop, optim
from fastlm.train.optim import AdamW, Muon, make_optimizers, named_state, schedule

HERE = Path(__file__).parent
SMALL = ModelConfig(
    vocab_size=100, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=32
)


JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def normalised(g: torch.Tensor) -> torch.Tensor:
    """(L, m, n), each matrix with a Frobenius norm of 1."""
    return g / g.norm(dim=(-2, -1), keepdim=True)


def iterated_on_x(x: torch.Tensor, round_to: torch.dtype) -> torch.Tensor:
    """The definition: X <- a X + (b A + c A A) X with A = X X^T, every product rounded."""
    x = x.to(round_to)
    for a, b, c in optim.POLAR_EXPRESS:
        gram = (x.double() @ x.mT.double()).to(round_to)
        p = (b * gram.double() + c * gram.double() @ gram.double()).to(round_to)
        x = (a * x.double() + p.double() @ x.double()).to(round_to)
    return x.double()


def spectra(size: int) -> dict[str, torch.Tensor]:
    """Singular values, largest first, of the kinds that gradients have."""
    i = torch.arange(1, size + 1, dtype=torch.float64)
    square = torch.randn(
        size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return {
        "a random square matrix's": torch.linalg.svdvals(square),
        "1 / sqrt(i)": i**-0.5,
        "1 / i": 1 / i,
        "a factor of 1000, evenly": 10 ** torch.linspace(0, -3, size, dtype=torch.float64),
        "eight large ones": torch.where(i <= 8, 1.0, 0.01).double(),
        "one large one": torch.where(i <= 1, 1.0, 0.01).double(),
    }


def matrix(singular_values: torch.Tensor, columns: int) -> torch.Tensor:
    """(1, m, columns) with these singular values and random singular vectors."""
    generator, m = torch.Generator().manual_seed(1), len(singular_values)
    u = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, m, generator=generator, dtype=torch.float64))[0]
    return normalised(((u * singular_values) @ v.mT)[None])


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 16, 40), (1, 40, 16), (1, 1, 5), (3, 24, 7)])
def test_orthogonalise_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    g = normalised(
        torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    (found,) = optim.orthogonalise([g.clone()])
    s = torch.linalg.svdvals(found)
    assert s.min() > 0.4
    assert s.max() < 1.13
    gu, _, gvh = torch.linalg.svd(g, full_matrices=False)
    along = (gu.mT @ found @ gvh.mT).diagonal(dim1=-2, dim2=-1)  # in g's own singular basis
    assert torch.allclose(along.sort().values, s.sort().values, atol=1e-8)


def test_stacks_of_all_shapes_at_once_are_each_iterated_on_its_own():
    """Shapes that share their short side share their matmuls.

    The iteration on the matrices themselves is the truth.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 12, 30), (1, 30, 12), (3, 12, 12), (2, 7, 9), (1, 1, 1), (2, 40, 12)]
    stacks = [normalised(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    found = optim.orthogonalise([x.clone() for x in stacks])
    for x, y in zip(stacks, found, strict=True):
        torch.testing.assert_close(y, iterated_on_x(x, torch.float64), rtol=0, atol=1e-9)


def test_orthogonalise_of_zero_is_zero():
    for dtype in (torch.float32, torch.float16):
        (found,) = optim.orthogonalise([torch.zeros(2, 4, 6, dtype=dtype)])
        assert found.abs().max() == 0


@pytest.mark.parametrize("columns", [96, 400])
@pytest.mark.parametrize("spectrum", spectra(96))
def test_in_fp16_it_is_as_close_to_exact_as_iterations_on_x_are_in_bf16(spectrum, columns):
    """Also where the spectrum ends far below what 16 bits resolve; in fp32 it is far closer."""
    x = matrix(spectra(96)[spectrum], columns)
    exact = iterated_on_x(x, torch.float64)

    def error(y: torch.Tensor) -> float:
        return float((y.double() - exact).norm() / exact.norm())

    in_bf16 = error(iterated_on_x(x, torch.bfloat16))
    assert error(optim.orthogonalise([x.half()])[0]) <= in_bf16
    assert error(optim.orthogonalise([x.float()])[0]) < 2e-3
    assert error(optim.orthogonalise([x.mT.half()])[0].mT) <= in_bf16


@pytest.mark.parametrize("spectrum", spectra(1024))
def test_polar_express_brings_singular_values_nearer_to_one_than_jordan_s_coefficients(spectrum):
    """Root mean square distances, in float64: the reason for the choice."""
    start = spectra(1024)[spectrum]
    distances = []
    for coefficients in (optim.POLAR_EXPRESS, JORDAN):
        x = start / start.norm()
        for a, b, c in coefficients:
            x = a * x + b * x**3 + c * x**5
        distances.append(float((x - 1).square().mean().sqrt()))
    assert distances[0] < 0.9 * distances[1]


def test_muon_takes_the_steps_of_torch_muon(monkeypatch):
    """With Jordan's coefficients, which are torch.optim.Muon's.

    It runs its iteration in bf16, so steps agree to bf16's precision; directions of many steps too.
    One of the matrices has no gradient in every other step, another one of zeros in the first.
    """
    monkeypatch.setattr(optim, "POLAR_EXPRESS", JORDAN)
    generator = torch.Generator().manual_seed(0)
    shapes = ((16, 24), (40, 16), (16, 24), (1, 12), (24, 24))
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    begin = [p.detach().clone() for p in ours]
    a = Muon([{"params": ours, "lr": 0.02, "weight_decay": 0.1}], momentum=0.9)
    b = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(6):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = None
            if i != 2 or step % 2:
                p.grad = (0.0 if i == 0 and step == 0 else 1.0) * torch.randn(
                    p.shape, generator=generator
                )
                q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, begin, strict=True):
        assert (p - q).norm() < 0.02 * (q - start).norm()


def clipped_twins() -> tuple[nn.Module, nn.Module]:
    """Two of the same model with the same large gradients, one of them without one of its."""
    twins = tuple(build(SMALL, 0, torch.device("cpu")) for _ in range(2))
    for model in twins:
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            p.grad = (
                None if name == "blocks.1.out.weight" else torch.randn(p.shape, generator=generator)
            )
    return twins


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_a_step_with_the_clipping_s_factor_is_a_step_after_clip_grad_norm(name, max_norm):
    """Bit for bit on a CPU, where what is clipped is then stepped by."""
    ours, theirs = clipped_twins()
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
    clipping = loop.clip(ours, max_norm)
    assert torch.equal(clipping.norm, norm)
    assert clipping.found_inf == 0
    for model, factor in ((ours, clipping.factor), (theirs, None)):
        for optimizer in make_optimizers(model, replace(OptimConfig(), name=name)):
            optimizer.step(0.5, factor)
    assert all(
        torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_scaled_loss_takes_the_step_of_an_unscaled_one_or_none(name):
    ours, theirs = clipped_twins()
    for p in ours.parameters():
        if p.grad is not None:
            p.grad *= 1024
    clippings = [loop.clip(ours, 1.0, torch.tensor(1024.0)), loop.clip(theirs, 1.0)]
    torch.testing.assert_close(clippings[0].norm, clippings[1].norm, rtol=1e-6, atol=0)
    start = [p.detach().clone() for p in ours.parameters()]
    for model, clipping in zip((ours, theirs), clippings, strict=True):
        model.optimizers = make_optimizers(model, replace(OptimConfig(), name=name))
        for optimizer in model.optimizers:
            optimizer.step(1.0, clipping.factor, clipping.found_inf)
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        assert (p - q).norm() <= 1e-4 * (q - before).norm()
    state = {key: value.clone() for key, value in named_state(ours, ours.optimizers).items()}
    after = [p.detach().clone() for p in ours.parameters()]
    ours.embedding.grad[3, 4] = math.inf
    clipping = loop.clip(ours, 1.0, torch.tensor(1024.0))
    assert clipping.found_inf == 1
    for optimizer in ours.optimizers:
        optimizer.step(1.0, clipping.factor, clipping.found_inf)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), after, strict=True))
    assert all(
        torch.equal(value, state[key]) for key, value in named_state(ours, ours.optimizers).items()
    )


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_gpu_s_steps_are_a_cpu_s_to_their_precision(name):
    """The GPU's kernels run in Triton's interpreter here, its fp16 matmuls on the CPU.

    Three steps with clipping.
    """
    ours, theirs = clipped_twins()
    start = [p.detach().clone() for p in ours.parameters()]
    for model in (ours, theirs):
        optimizers = make_optimizers(model, replace(OptimConfig(), name=name))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad = torch.randn(p.shape, generator=generator)
            with triton_on_cpu() if model is ours else contextlib.nullcontext():
                clipping = loop.clip(model, 1.0)
                for optimizer in optimizers:
                    optimizer.step(1 / (step + 1), clipping.factor)
    assert torch.equal(ours.blocks[1].out.weight, theirs.blocks[1].out.weight)
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        assert (p - q).norm() <= (0.02 if p.dim() == 2 and name == "muon" else 1e-5) * (
            q - before
        ).norm()


def test_two_processes_share_out_the_matrices_and_take_the_steps_of_one(tmp_path):
    """Bit for bit; shapes of which there are fewer than processes, and of which the processes get
    unlike numbers.
    """
    found = []
    for world in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
        folder = tmp_path / str(world)
        folder.mkdir()
        subprocess.run(
            [*command, HERE / "muon_steps.py", folder],
            env=environment,
            check=True,
            cwd=HERE.parents[1],
        )
        found.append([torch.load(folder / f"{rank}.pt") for rank in range(world)])
    (alone,), both = found
    assert len(alone["matrices"]) == 6
    for one in both:
        assert all(
            torch.equal(a, b) for a, b in zip(alone["matrices"], one["matrices"], strict=True)
        )
    assert alone["orthogonalised"] == 6
    assert [one["orthogonalised"] for one in both] == [4, 2]


def test_every_parameter_has_one_optimizer_and_norms_do_not_decay():
    for name in ("muon", "adamw"):
        model = build(SMALL, 0, torch.device("cpu"))
        optimizers = make_optimizers(model, replace(OptimConfig(), name=name))
        seen = [p for o in optimizers for g in o.groups for p in g["params"]]
        assert len(seen) == len(set(seen)) == len(list(model.parameters()))
        for optimizer in optimizers:
            for group in optimizer.groups:
                decays = group["weight_decay"] > 0
                assert all((p.dim() == 2) == decays for p in group["params"])
        muon = {p for o in optimizers if isinstance(o, Muon) for g in o.groups for p in g["params"]}
        assert muon == (
            {p for b in model.blocks for p in b.parameters() if p.dim() == 2}
            if name == "muon"
            else set()
        )


def test_adamw_takes_the_textbook_step():
    model = build(SMALL, 0, torch.device("cpu"))
    o = replace(OptimConfig(), name="adamw", lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99)
    (optimizer,) = make_optimizers(model, o)
    p = model.blocks[0].out.weight
    start = p.detach().clone()
    for q in model.parameters():
        q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    g = p.grad.clone()
    optimizer.step()
    m, v = (1 - 0.9) * g / (1 - 0.9), (1 - 0.99) * g * g / (1 - 0.99)
    expected = start * (1 - 0.01 * 0.1) - 0.01 * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_adamw_takes_the_steps_of_torch_adamw():
    """Bit for bit, with the learning rate changing and a parameter that has no gradient in every
    other step.
    """
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((16, 24), (7,), (3, 5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = [{"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.01, "weight_decay": 0.0}]
    a = AdamW(
        [{"params": p, **o} for p, o in zip((ours[:1], ours[1:]), options, strict=True)], 0.9, 0.95
    )
    b = torch.optim.AdamW(
        [{"params": p, **o} for p, o in zip((theirs[:1], theirs[1:]), options, strict=True)],
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    for step in range(6):
        for p, q in list(zip(ours, theirs, strict=True))[: 3 - step % 2]:
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for ours_, theirs_ in zip(a.groups, b.param_groups, strict=True):
            theirs_["lr"] = 0.25 * (step + 1) * ours_["lr"]
        a.step(0.25 * (step + 1))
        b.step()
        for optimizer in (a, b):
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def lr(step: int, steps: int = 100, **changes) -> float:
    return schedule(
        step, steps, replace(OptimConfig(), warmup_steps=10, decay_fraction=0.2, **changes)
    )


def test_wsd_rises_stays_and_falls():
    assert [lr(s, schedule="wsd") for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert all(lr(s, schedule="wsd") == 1 for s in range(9, 81))
    assert [lr(s, schedule="wsd") for s in (81, 90, 99)] == pytest.approx([0.95, 0.5, 0.05])


def test_cosine_and_linear_fall_from_the_warm_up_to_the_floor():
    for name, middle in (("linear", 0.5), ("cosine", 0.5)):
        assert lr(10, schedule=name) == pytest.approx(1.0)
        assert lr(55, schedule=name) == pytest.approx(middle)
        falling = [lr(s, schedule=name, min_lr_fraction=0.1) for s in range(10, 100)]
        assert falling == sorted(falling, reverse=True)
        assert 0.1 < falling[-1] < 0.12
    p = (30 - 10) / 90
    assert lr(30, schedule="cosine") == pytest.approx((1 + math.cos(math.pi * p)) / 2)


@pytest.mark.parametrize("name", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 2, 10, 11, 12])
def test_very_short_runs_have_a_positive_learning_rate_at_every_step(name, steps):
    assert all(0 < lr(s, steps, schedule=name) <= 1 for s in range(steps))

"""Muon against torch.optim.Muon and the singular value decomposition, AdamW's groups, the schedules against their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastlm.config import ModelConfig, OptimConfig
from fastlm.model import build
from fastlm.train.optim import AdamW, Muon, make_optimizers, orthogonalise, schedule

SMALL = ModelConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=32)


@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (40, 16), (1, 5), (3, 24, 7)])
def test_orthogonalise_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.svdvals(orthogonalise(g))
    assert s.min() > 0.3
    assert s.max() < 1.3
    gu, _, gvh = torch.linalg.svd(g, full_matrices=False)
    along = (gu.mT @ orthogonalise(g) @ gvh.mT).diagonal(dim1=-2, dim2=-1)  # in g's own singular basis
    assert torch.allclose(along.sort().values, s.sort().values, atol=1e-8)


def test_orthogonalise_of_zero_is_zero():
    assert orthogonalise(torch.zeros(4, 6)).abs().max() == 0


def test_muon_takes_the_steps_of_torch_muon():
    """torch.optim.Muon runs its iteration in bf16, so steps agree to bf16's precision; directions of many steps too."""
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((16, 24), (40, 16), (16, 24))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    begin = [p.detach().clone() for p in ours]
    a = Muon([{"params": ours, "lr": 0.02, "weight_decay": 0.1}], momentum=0.9)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, begin, strict=True):
        assert (p - q).norm() < 0.02 * (q - start).norm()


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
        assert muon == ({p for b in model.blocks for p in b.parameters() if p.dim() == 2} if name == "muon" else set())


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
    """Bit for bit, with the learning rate changing and a parameter that has no gradient in every other step."""
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((16, 24), (7,), (3, 5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = [{"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.01, "weight_decay": 0.0}]
    a = AdamW([{"params": p, **o} for p, o in zip((ours[:1], ours[1:]), options, strict=True)], 0.9, 0.95)
    b = torch.optim.AdamW([{"params": p, **o} for p, o in zip((theirs[:1], theirs[1:]), options, strict=True)],
                          betas=(0.9, 0.95), eps=1e-8, fused=True)  # fmt: skip
    for step in range(6):
        for p, q in list(zip(ours, theirs, strict=True))[: 3 - step % 2]:
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for mine, its in zip(a.groups, b.param_groups, strict=True):
            mine["lr"] = its["lr"] = 0.01 * (step + 1)
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def lr(step: int, steps: int = 100, **changes) -> float:
    return schedule(step, steps, replace(OptimConfig(), warmup_steps=10, decay_fraction=0.2, **changes))


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

"""The GPU program of a small training step, executed on the CPU, against eager PyTorch.

Run by test_instruments.py, in a process of its own.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpurun
from gpurun import run_for_gpu

DIM, HEADS, FFN, VOCAB, LENGTH, BATCH = 64, 4, 128, 500, 32, 2


class Layer(nn.Module):
    """A Llama-style layer with embedding and head, in plain PyTorch."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)
        self.gate_up = nn.Linear(DIM, 2 * FFN, bias=False)
        self.down = nn.Linear(FFN, DIM, bias=False)
        self.norm1 = nn.RMSNorm(DIM)
        self.norm2 = nn.RMSNorm(DIM)

    def forward(self, ids, targets, cos, sin):
        x = self.embedding(ids)
        q, k, v = self.qkv(self.norm1(x)).view(BATCH, LENGTH, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(BATCH, LENGTH, DIM))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        return F.cross_entropy((x @ self.embedding.weight.T).flatten(0, 1), targets.flatten())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def inputs() -> tuple[torch.Tensor, ...]:
    width = DIM // HEADS
    waves = 10000 ** -(torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(LENGTH).float(), waves).repeat(1, 2)
    ids, targets = torch.randint(0, VOCAB, (2, BATCH, LENGTH)).unbind(0)
    return ids, targets, angles.cos(), angles.sin()


def test_the_gpu_program_of_a_training_step_gives_eager_loss_and_gradients():
    torch.manual_seed(0)
    model, batch = Layer(), inputs()
    twin = copy.deepcopy(model)
    loss = model(*batch)
    loss.backward()
    report, stats = run_for_gpu(twin, lambda: batch)
    assert abs(report.result.item() / loss.item() - 1) < 1e-6
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 2e-6 * a.grad.norm(), name
    written = sum(graph.launches.total() for graph in report.graphs)
    assert sum(len(launches) for launches in stats.values()) == written


def test_a_fault_planted_in_a_generated_kernel_is_seen(monkeypatch):
    x, w = torch.randn(16, 64), torch.randn(64)

    def step(x, w):
        return (F.rms_norm(x, (64,), w, 1e-6)).square().mean()

    good, _ = run_for_gpu(step, lambda: (x, w))
    assert torch.allclose(good.result, step(x, w))
    build = gpurun.SimulatedKernel.__init__

    def build_wrong(self, name, source, *rest):
        build(self, name, source.replace("libdevice.rsqrt", "libdevice.sqrt"), *rest)

    monkeypatch.setattr(gpurun.SimulatedKernel, "__init__", build_wrong)
    bad, _ = run_for_gpu(step, lambda: (x, w))
    assert not torch.allclose(bad.result, step(x, w))


@pytest.mark.parametrize("width", [33, 1000])
def test_odd_widths(width):
    def step(z):
        return F.layer_norm(z, (width,)).softmax(-1).pow(2).sum()

    x = torch.randn(7, width, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    loss = step(x)
    loss.backward()
    report, _ = run_for_gpu(step, lambda: (y,))
    assert torch.allclose(report.result, loss)
    assert torch.allclose(x.grad, y.grad, atol=1e-6)

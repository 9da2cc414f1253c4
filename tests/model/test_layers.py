"""Modules own their forward: what is put in the place of one, or hooked on it, takes part."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import randomised
from torch import Tensor, nn

from fastlm import kernels
from fastlm.config import ModelConfig, Sampling
from fastlm.inference.generation import generate
from fastlm.model import Transformer

CONFIG = ModelConfig(
    vocab_size=150,
    dim=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=80,
    max_seq_len=64,
    qk_norm=True,
)
MATRICES = ("qkv", "out", "gate_up", "down")
NORMS = ("attention_norm", "q_norm", "k_norm", "ffn_norm")


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(150, (3, 18), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def greedy(model: Transformer) -> list[list[int]]:
    return generate(model, [[5, 6, 7], [8, 9]], 12, Sampling(temperature=0))


class LoRA(nn.Module):
    """base(x) + x A^T B^T, A (rank, D) and B (O, rank) trained (Hu et al. 2021)."""

    def __init__(self, base: nn.Module, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        outputs, inputs = base.weight.shape
        generator = torch.Generator().manual_seed(outputs)
        self.a = nn.Parameter(torch.randn(rank, inputs, generator=generator) / inputs)
        self.b = nn.Parameter(torch.randn(outputs, rank, generator=generator))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        z = self.base(x)
        if x.shape[-1] != self.a.shape[1]:  # down takes gate and up
            x = kernels.swiglu(x)
        more = x @ self.a.T @ self.b.T
        if isinstance(z, tuple):
            return tuple(p + q for p, q in zip(z, more.split(self.base.sizes, -1), strict=True))
        return z + more


def replaced(model: Transformer, name: str, make) -> Transformer:
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        setattr(block, name, make(getattr(block, name)))
    return twin


@pytest.mark.parametrize("name", MATRICES)
def test_lora_trains_and_writes_as_the_model_with_its_product_in_the_weight(name):
    model = randomised(CONFIG)
    adapted = replaced(model, name, LoRA)

    def merged(base: nn.Module) -> nn.Module:
        lora = LoRA(base)
        with torch.no_grad():
            base.weight += lora.b @ lora.a
        return base.requires_grad_(True)

    whole = replaced(model, name, merged)
    tokens, targets = batch()
    for m in (adapted, whole):
        m.loss(tokens, targets).backward()
    assert (model.loss(tokens, targets) - whole.loss(tokens, targets)).abs() > 1e-2
    nats = [m.loss(tokens, targets) for m in (adapted, whole)]
    torch.testing.assert_close(*nats, rtol=1e-5, atol=0)
    for block, other in zip(adapted.blocks, whole.blocks, strict=True):
        lora, weight = getattr(block, name), getattr(other, name).weight
        assert lora.base.weight.grad is None
        torch.testing.assert_close(lora.a.grad, lora.b.T @ weight.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(lora.b.grad, weight.grad @ lora.a.T, rtol=1e-3, atol=1e-4)
    assert greedy(adapted) == greedy(whole) != greedy(model)


class Int8(nn.Module):
    """A linear layer whose weight is whole numbers of a step that each row has."""

    def __init__(self, base: nn.Module):
        super().__init__()
        step = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("step", step)
        self.register_buffer("weight", (base.weight.detach() / step).round().to(torch.int8))
        self.sizes = getattr(base, "sizes", None)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        weight = self.weight * self.step
        if x.shape[-1] != weight.shape[1]:
            return kernels.swiglu_linear(x, weight)
        return kernels.linear(x, weight, self.sizes)


@pytest.mark.parametrize("name", MATRICES)
def test_a_quantised_weight_is_used(name):
    model = randomised(CONFIG)
    quantised = replaced(model, name, Int8)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for block, other in zip(quantised.blocks, rounded.blocks, strict=True):
            module = getattr(block, name)
            getattr(other, name).weight.copy_(module.weight * module.step)
    tokens, targets = batch()
    assert torch.equal(quantised.loss(tokens, targets), rounded.loss(tokens, targets))
    assert not torch.equal(quantised.loss(tokens, targets), model.loss(tokens, targets))
    assert greedy(quantised) == greedy(rounded)


@pytest.mark.parametrize("name", [*MATRICES, *NORMS])
def test_a_hook_sees_and_changes_what_a_module_gives(name):
    model = randomised(CONFIG)
    tokens, targets = batch()
    before, written = model.loss(tokens, targets), greedy(model)
    calls = []

    def louder(module: nn.Module, inputs: tuple, output):
        calls.append(module)
        if isinstance(output, tuple):
            return (2 * output[0], *output[1:])
        return 2 * output

    hooks = [getattr(block, name).register_forward_hook(louder) for block in model.blocks]
    assert not torch.equal(model.loss(tokens, targets), before)
    assert calls == [getattr(block, name) for block in model.blocks]
    calls.clear()
    greedy(model)
    assert len(calls) == 12 * len(model.blocks)
    for hook in hooks:
        hook.remove()
    assert torch.equal(model.loss(tokens, targets), before)
    assert greedy(model) == written


@pytest.mark.parametrize("name", NORMS)
def test_another_norm_takes_part(name):
    class Shifted(nn.Module):
        """The norm, and something to tell it by."""

        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, *inputs: Tensor):
            output = self.base(*inputs)
            return (output[0] + 1, output[1]) if isinstance(output, tuple) else output + 1

    model = randomised(CONFIG)
    shifted = replaced(model, name, Shifted)
    tokens, targets = batch()
    assert (shifted.loss(tokens, targets) - model.loss(tokens, targets)).abs() > 1e-2
    assert greedy(shifted) != greedy(model)

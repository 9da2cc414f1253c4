"""Checkpoints from before parameters were saved by name and norms were modules are still read.

old_checkpoints/NAME: what the code of then wrote after 3 and after 6 steps with optimizer NAME.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastlm import checkpoint
from fastlm.config import ModelConfig, OptimConfig
from fastlm.model import build
from fastlm.model.old_names import current_name, old_names
from fastlm.train.optim import make_optimizers, named_state
from fastlm.train.packed import model_hash

CPU = torch.device("cpu")


OLD = Path(__file__).parent / "old_checkpoints"


def old_model(folder: Path):
    """An untrained model of the folder's shape, and its optimizers."""
    config = ModelConfig(**json.loads((folder / "state.json").read_text())["model"])
    model = build(config, 0, CPU)
    return model, make_optimizers(model, replace(OptimConfig(), name=folder.parent.name))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_goes_on_from_a_checkpoint_that_numbers_parameters(optimizer):
    """step-000006 is where the code of then went; a swapped momentum is far off."""
    start, end = (OLD / optimizer / f"step-00000{n}" for n in (3, 6))
    model, optimizers = old_model(start)
    checkpoint.load(start, model, named_state(model, optimizers))
    for _ in range(3):
        tokens = torch.randint(40, (2, 8))
        model.loss(tokens, tokens.roll(-1, 1)).backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    expected, theirs = old_model(end)
    checkpoint.load(end, expected, named_state(expected, theirs))
    found = dict(model.named_parameters()) | named_state(model, optimizers)
    wanted = dict(expected.named_parameters()) | named_state(expected, theirs)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_numbered_parameters_are_found_by_name():
    """By hand: Muon has the matrices; AdamW embedding, head, then vectors, the last norm first."""
    path = OLD / "muon" / "step-000003"
    model, optimizers = old_model(path)
    checkpoint.load(path, model, named_state(model, optimizers))
    state, old = named_state(model, optimizers), checkpoint.tensors(path / "optimizer.safetensors")
    for number, name in {
        "0.0": "blocks.0.qkv.weight",
        "0.5": "blocks.1.out.weight",
        "0.7": "blocks.1.down.weight",
    }.items():
        assert torch.equal(state[f"{name}.momentum"], old[f"{number}.momentum"])
    vectors = {
        "1.2": "norm.weight",
        "1.3": "blocks.0.attention_norm.weight",
        "1.7": "blocks.0.qkv.bias",
        "1.11": "blocks.1.ffn_norm.weight",
    }
    for number, name in ({"1.0": "embedding", "1.1": "head"} | vectors).items():
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(state[f"{name}.{kind}"], old[f"{number}.{kind}"])
    assert len(state) == len(old) - 1  # and the random state


def test_a_model_is_loaded_and_keeps_its_loss_and_its_hash():
    """By the code of then; runs note the hash of the model that they started from."""
    known = {"muon": ("dadaf76306b5f6f2", 59.147194), "adamw": ("802a61a1ebc6c13d", 59.209148)}
    for optimizer, (digest, nats) in known.items():
        model, _ = checkpoint.load_model(OLD / optimizer / "step-000003", CPU)
        tokens = torch.arange(16)[None]
        assert model_hash(model) == digest
        assert model.loss(tokens, tokens).item() == pytest.approx(nats, rel=1e-5)


def test_names_change_once():
    model, _ = old_model(OLD / "muon" / "step-000003")
    names = [name for name, _ in model.named_parameters()]
    assert [current_name(name) for name in names] == names
    assert {old: current_name(old) for old in old_names(names)} == old_names(names)
    assert current_name("blocks.1.q_norm.exp_avg") == "blocks.1.q_norm.weight.exp_avg"
    assert current_name("blocks.1.q_norm.weight.exp_avg") == "blocks.1.q_norm.weight.exp_avg"

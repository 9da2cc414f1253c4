"""Checkpoints: everything comes back bit for bit, nothing is ever half there, and each kind of
damage is named.
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, replace

import pytest
import torch

from fastlm import checkpoint, files
from fastlm.config import ModelConfig, OptimConfig
from fastlm.errors import UserError
from fastlm.model import build
from fastlm.train.optim import make_optimizers, named_state

SMALL = ModelConfig(
    vocab_size=100, dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=32
)


def trained(config: ModelConfig = SMALL, steps: int = 2, seed: int = 0, optimizer: str = "muon"):
    model = build(config, seed, torch.device("cpu"))
    optimizers = make_optimizers(model, replace(OptimConfig(), name=optimizer))
    for i in range(steps):
        torch.manual_seed(seed + i)
        advance(model, optimizers)
    return model, optimizers


def advance(model, optimizers) -> None:
    tokens = torch.randint(100, (2, 8))
    model.loss(tokens, tokens.roll(-1, 1)).backward()
    for o in optimizers:
        o.step()
        o.zero_grad()


def save(folder, step: int = 2, nats: float | None = None, **made):
    model, optimizers = trained(**made)
    state = {
        "step": step,
        "position": 16 * step,
        "validation_loss": nats,
        "model": asdict(model.config),
    }
    return checkpoint.save(folder, model, named_state(model, optimizers), state), model, optimizers


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_goes_on_bit_for_bit(tmp_path, optimizer):
    path, model, optimizers = save(tmp_path, optimizer=optimizer)
    torch.manual_seed(9)
    random = torch.get_rng_state()
    checkpoint_again, _, _ = save(tmp_path, step=3, optimizer=optimizer)
    assert checkpoint_again.name == "step-000003"
    twin, twins = trained(steps=0, seed=5, optimizer=optimizer)
    state = checkpoint.load(path, twin, named_state(twin, twins))
    assert (state["step"], state["position"]) == (2, 32)
    for seed in range(3):
        torch.manual_seed(seed)
        advance(model, optimizers)
        torch.manual_seed(seed)
        advance(twin, twins)
    for (name, a), b in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
    assert random.dtype == torch.uint8


def test_the_random_state_comes_back(tmp_path):
    path, _, _ = save(tmp_path)
    expected = torch.rand(5)  # what follows the save
    torch.manual_seed(123)
    model, optimizers = trained(steps=0)
    checkpoint.load(path, model, named_state(model, optimizers))
    assert torch.equal(torch.rand(5), expected)


def test_the_best_and_the_last_are_kept(tmp_path):
    for step, nats in [(1, 3.0), (2, 1.5), (3, None), (4, 2.0), (5, None)]:
        save(tmp_path, step, nats, steps=0)
    assert checkpoint.best(tmp_path) == (tmp_path / "step-000002", 1.5)
    checkpoint.prune(tmp_path, keep=2)
    assert [p.name for p in checkpoint.steps_saved(tmp_path)] == [
        "step-000002",
        "step-000004",
        "step-000005",
    ]


def test_a_path_names_a_run_or_a_checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step, nats in [(1, 1.0), (2, 2.0)]:
        save(folder, step, nats, steps=0)
    assert checkpoint.locate(tmp_path / "run").name == "step-000002"
    assert checkpoint.locate(tmp_path / "run", lowest_loss=True).name == "step-000001"
    assert checkpoint.locate(folder / "step-000001").name == "step-000001"
    model, state = checkpoint.load_model(tmp_path / "run", torch.device("cpu"))
    assert model.config == SMALL
    assert state["step"] == 1
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.locate(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.locate(tmp_path / "nowhere")


def test_a_step_past_a_million_is_the_newest(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path / "checkpoints", step, steps=0)
    assert checkpoint.locate(tmp_path).name == "step-1000000"
    checkpoint.prune(tmp_path / "checkpoints", keep=1)
    assert [p.name for p in checkpoint.steps_saved(tmp_path / "checkpoints")] == ["step-1000000"]


def test_a_folder_without_its_state_is_no_checkpoint(tmp_path):
    """As a kill in the middle of a removal leaves it, or a stranger's hand."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(folder, step, float(step), steps=0)
    (folder / "step-000002" / "state.json").unlink()
    (folder / "step-x").mkdir()
    assert checkpoint.locate(tmp_path).name == "step-000001"
    assert checkpoint.best(folder) == (folder / "step-000001", 1.0)
    checkpoint.prune(folder, keep=1)
    assert [p.name for p in checkpoint.steps_saved(folder)] == ["step-000001"]


def test_behind_a_damaged_checkpoint_the_one_before_serves(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(folder, step, float(step), steps=0)
    flip(folder / "step-000003" / "model.safetensors")
    (folder / "step-000002" / "state.json").write_text("{")
    place, state, problems = checkpoint.newest_whole(tmp_path)
    assert (place.name, state["step"]) == ("step-000001", 1)
    assert ["step-000003" in problems[0], "step-000002" in problems[1]] == [True, True]
    assert checkpoint.best(folder) == (folder / "step-000001", 1.0)
    flip(folder / "step-000001" / "model.safetensors")
    with pytest.raises(UserError, match="has no whole checkpoint; start a new run.*step-000003"):
        checkpoint.newest_whole(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_trained_on(tmp_path, value):
    path, model, optimizers = save(tmp_path, step=1)
    state = {"step": 2, "validation_loss": None, "model": asdict(model.config)}
    with torch.no_grad():
        model.blocks[0].down.weight[1, 2] = value
    words = "after step 2 the weights are not finite .*step-000001 is whole"
    with pytest.raises(UserError, match=words):
        checkpoint.save(tmp_path, model, named_state(model, optimizers), state)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    files.write_tensors(path / "model.safetensors", parameters)
    edit(path, sha256={name: files.sha256(path / name) for name in checkpoint.FILES})
    with pytest.raises(UserError, match="the weights are not finite"):
        load_fresh(path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path, value):
    save(tmp_path, 1, 2.5, steps=0)
    save(tmp_path, 2, value, steps=0)
    assert checkpoint.best(tmp_path) == (tmp_path / "step-000001", 2.5)


def load_fresh(path, **made):
    model, optimizers = trained(steps=0, **made)
    return checkpoint.load(path, model, named_state(model, optimizers))


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "one bit of the weights": (lambda p: flip(p / "model.safetensors"), "is damaged: its SHA-256"),
    "one bit of the optimizer": (
        lambda p: flip(p / "optimizer.safetensors"),
        "is damaged: its SHA-256",
    ),
    "cut short": (
        lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:99]
        ),
        "is damaged",
    ),
    "a file missing": (lambda p: (p / "optimizer.safetensors").unlink(), "could not read"),
    "state cut short": (lambda p: (p / "state.json").write_text('{"step": 3, '), "not JSON"),
    "state of another kind": (
        lambda p: (p / "state.json").write_text("[]"),
        "expected a JSON object",
    ),
    "state without digests": (
        lambda p: (p / "state.json").write_text("{}"),
        "lacks its step, or the digests",
    ),
    "digests emptied": (lambda p: edit(p, sha256={}), "lacks its step, or the digests"),
    "a digest of another file": (
        lambda p: edit(p, sha256={"/dev/zero": ""}),
        "lacks its step, or the digests",
    ),
    "a position edited": (
        lambda p: edit(p, keep_digest=True, position=33),
        "was changed after it was written",
    ),
    "a step of text": (lambda p: edit(p, step="2"), "lacks its step, or the digests"),
}


def edit(path, keep_digest: bool = False, **changes) -> None:
    """Change fields of the state, and its own digest too unless it is to be kept."""
    state = json.loads((path / "state.json").read_text()) | changes
    noted = state.pop("state_sha256")
    noted = noted if keep_digest else checkpoint.digest_of(state)
    (path / "state.json").write_text(json.dumps(state | {"state_sha256": noted}))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path, name):
    harm, words = DAMAGE[name]
    path, _, _ = save(tmp_path)
    harm(path)
    with pytest.raises(UserError, match=words) as caught:
        load_fresh(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_safetensors_is_named(tmp_path):
    path, _, _ = save(tmp_path)
    (path / "model.safetensors").write_bytes(b"not safetensors at all")
    digests = {name: files.sha256(path / name) for name in checkpoint.FILES}
    edit(path, sha256=digests)
    with pytest.raises(UserError, match="could not read"):
        load_fresh(path)


@pytest.mark.parametrize(
    "change", [{"dim": 64}, {"n_layers": 2}, {"tie_embeddings": False}, {"vocab_size": 200}]
)
def test_another_shape_is_named(tmp_path, change):
    path, _, _ = save(tmp_path)
    with pytest.raises(UserError, match="holds a model of another shape"):
        load_fresh(path, config=replace(SMALL, **change))


def test_another_optimizer_is_named(tmp_path):
    path, _, _ = save(tmp_path, optimizer="muon")
    with pytest.raises(UserError, match="another optimizer's state"):
        load_fresh(path, optimizer="adamw")


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_half_written(tmp_path, monkeypatch):
    save(tmp_path, step=1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(UserError, match="the disk is full .*; then --resume: step-000001 is whole"):
        save(tmp_path, step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    load_fresh(tmp_path / "step-000001")

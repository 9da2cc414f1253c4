"""The functions the stages share: gradients do not depend on micro-batches, clipping, signals, where a run may live."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch

from fastlm.config import ModelConfig
from fastlm.data import IGNORED
from fastlm.errors import UserError
from fastlm.model import build, compiled, pick_device
from fastlm.train import loop

SMALL = ModelConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=32)


def model_and_batch():
    model = build(SMALL, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    tokens = torch.randint(100, (8, 32), generator=generator)
    targets = torch.randint(100, (8, 32), generator=generator)
    counted = torch.tensor([32, 1, 0, 17, 5, 0, 0, 31])  # very unequal; rows 5 and 6, a micro-batch of 2x4, hold almost nothing
    targets[torch.arange(32) >= counted[:, None]] = IGNORED
    return model, tokens, targets


def gradients(model, tokens, targets, rows: int):
    model = copy.deepcopy(model)
    n_counted = int((targets != IGNORED).sum())
    micro_batches = zip(tokens.split(rows), targets.split(rows), strict=True)
    value = loop.accumulate(lambda *batch: {"loss": model.loss(*batch)}, micro_batches, n_counted)["loss"]
    return value, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_gradients_do_not_depend_on_micro_batches(rows):
    model, tokens, targets = model_and_batch()
    whole_value, whole = gradients(model.double(), tokens, targets, 8)
    value, parts = gradients(model, tokens, targets, rows)
    torch.testing.assert_close(value, whole_value, rtol=1e-6, atol=0)
    for name, grad in whole.items():
        assert (parts[name] - grad).norm() <= 1e-6 * grad.norm(), name


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_gradients_in_fp32_do_not_depend_on_micro_batches(rows):
    model, tokens, targets = model_and_batch()
    _, whole = gradients(model, tokens, targets, 8)
    _, parts = gradients(model, tokens, targets, rows)
    for name, grad in whole.items():
        assert (parts[name] - grad).norm() <= 1e-6 * grad.norm(), name


def test_the_value_is_the_mean_over_counted_tokens():
    model, tokens, targets = model_and_batch()
    value, _ = gradients(model, tokens, targets, 4)
    expected = torch.nn.functional.cross_entropy(model.logits(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)


def test_a_fully_masked_step_is_zero_with_zero_gradients():
    model, tokens, targets = model_and_batch()
    value, grads = gradients(model, tokens, torch.full_like(targets, IGNORED), 4)
    assert value.item() == 0
    assert all(g is None or g.abs().max() == 0 for g in grads.values())


def test_clip_scales_to_the_norm_and_leaves_smaller_gradients():
    model, tokens, targets = model_and_batch()
    model.loss(tokens, targets).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in before.values()]).norm()
    torch.testing.assert_close(loop.clip(model, 0.0), norm, rtol=1e-5, atol=0)
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    loop.clip(model, float(norm) / 4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before[name] / 4, rtol=1e-4, atol=1e-8)


def test_validation_is_the_mean_over_all_counted_tokens_whatever_the_batches():
    model, tokens, targets = model_and_batch()
    expected = torch.nn.functional.cross_entropy(
        model.logits(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100
    ).item()
    for rows in (1, 3, 8):
        batches = (((x, y), int((y != IGNORED).sum())) for x, y in zip(tokens.split(rows), targets.split(rows), strict=True))
        means = loop.validate(lambda *batch: {"loss": model.loss(*batch)}, batches, torch.device("cpu"))
        assert means["loss"] == pytest.approx(expected, rel=1e-6)


def test_due_every_so_often_and_at_the_end():
    assert [n for n in range(1, 11) if loop.due(n, 4, 10)] == [4, 8, 10]
    assert [n for n in range(1, 11) if loop.due(n, 0, 10)] == [10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_a_flag_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with loop.stop_signals() as stopped:
        assert stopped() == 0
        os.kill(os.getpid(), number)
        assert stopped() == number
    assert signal.getsignal(number) is before
    assert stopped() == number


def test_a_second_ctrl_c_interrupts_at_once():
    with loop.stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_never_lands_on_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(loop.choose_run("", "pretrain-demo")) == "runs/pretrain-demo"
    (tmp_path / "runs" / "pretrain-demo").mkdir(parents=True)
    assert str(loop.choose_run("", "pretrain-demo")) == "runs/pretrain-demo-2"
    (tmp_path / "mine").mkdir()
    assert loop.choose_run("mine", "x").name == "mine"
    (tmp_path / "mine" / "config.toml").touch()
    with pytest.raises(UserError, match="mine is not empty: it may hold another run"):
        loop.choose_run("mine", "x")


def test_unusable_devices_are_named(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device is 'gpu'; choose among auto, cpu, cuda"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="PyTorch sees no GPU here"):
        pick_device("cuda")


def test_compiling_without_a_compiler_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and none was found"):
        compiled(torch.sin, torch.device("cpu"))

"""The functions the stages share.

Gradients do not depend on micro-batches, clipping, signals, where a run may live.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch

from fastlm.config import ModelConfig
from fastlm.data import IGNORED
from fastlm.errors import UserError
from fastlm.model import build
from fastlm.train import loop, run

SMALL = ModelConfig(
    vocab_size=100, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=32
)


def model_and_batch():
    model = build(SMALL, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    tokens = torch.randint(100, (8, 32), generator=generator)
    targets = torch.randint(100, (8, 32), generator=generator)
    counted = torch.tensor(
        [32, 1, 0, 17, 5, 0, 0, 31]
    )  # very unequal; rows 5 and 6, a micro-batch of 2x4, hold almost nothing
    targets[torch.arange(32) >= counted[:, None]] = IGNORED
    return model, tokens, targets


def gradients(model, tokens, targets, rows: int):
    model = copy.deepcopy(model)
    n_counted = int((targets != IGNORED).sum())
    micro_batches = zip(tokens.split(rows), targets.split(rows), strict=True)
    value = loop.accumulate(lambda *batch: {"loss": model.loss(*batch)}, micro_batches, n_counted)[
        "loss"
    ]
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
    expected = torch.nn.functional.cross_entropy(
        model.logits(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)


def test_a_fully_masked_step_is_zero_with_zero_gradients():
    model, tokens, targets = model_and_batch()
    value, grads = gradients(model, tokens, torch.full_like(targets, IGNORED), 4)
    assert value.item() == 0
    assert all(g is None or g.abs().max() == 0 for g in grads.values())


def test_clip_finds_the_norm_and_the_factor_and_leaves_the_gradients():
    model, tokens, targets = model_and_batch()
    model.loss(tokens, targets).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = torch.cat([g.double().flatten() for g in before.values()]).norm().float()
    for max_norm, factor in ((0.0, None), (float(norm) / 4, 0.25), (float(norm) * 2, 1.0)):
        clipping = loop.clip(model, max_norm)
        torch.testing.assert_close(clipping.norm, norm, rtol=1e-6, atol=0)
        assert (
            (clipping.factor is None)
            if factor is None
            else clipping.factor.item() == pytest.approx(factor, rel=1e-5)
        )
        assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())


def test_validation_is_the_mean_over_all_counted_tokens_whatever_the_batches():
    model, tokens, targets = model_and_batch()
    expected = torch.nn.functional.cross_entropy(
        model.logits(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100
    ).item()
    for rows in (1, 3, 8):
        batches = (
            ((x, y), int((y != IGNORED).sum()))
            for x, y in zip(tokens.split(rows), targets.split(rows), strict=True)
        )
        means = loop.validate(
            lambda *batch: {"loss": model.loss(*batch)}, batches, torch.device("cpu")
        )
        assert means["loss"] == pytest.approx(expected, rel=1e-6)


def test_due_every_so_often_and_at_the_end():
    assert [n for n in range(1, 11) if loop.due(n, 4, 10)] == [4, 8, 10]
    assert [n for n in range(1, 11) if loop.due(n, 0, 10)] == [10]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
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
    assert str(run.claim_folder("", "pretrain-demo")) == "runs/pretrain-demo"
    assert str(run.claim_folder("", "pretrain-demo")) == "runs/pretrain-demo-2"
    (tmp_path / "mine").mkdir()
    assert run.claim_folder("mine", "x").name == "mine"
    (tmp_path / "mine" / "config.toml").touch()
    with pytest.raises(UserError, match="mine is not empty: it may hold another run"):
        run.claim_folder("mine", "x")


def test_two_processes_do_not_share_a_run(tmp_path):
    """The lock is the kernel's: it goes with the process that holds it, kill -9 included."""
    code = (
        "import sys; from pathlib import Path; from fastlm.train.run import locked; "
        "lock = locked(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="is in use: another fastlm trains in it"):
        run.locked(tmp_path)
    holder.kill()
    holder.communicate()
    run.locked(tmp_path).release()

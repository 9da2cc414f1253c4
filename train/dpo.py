"""Direct preference optimization: pairs of answers in, a model that prefers the chosen ones out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlm.config import DpoConfig
from fastlm.data.examples.load import load_preferences
from fastlm.data.examples.packing import PackedBatch
from fastlm.errors import check, nearest
from fastlm.monitor import Monitor
from fastlm.runtime import autocast
from fastlm.train import loop, parallel
from fastlm.train.losses import LOSSES, Pairs, membership, sum_per_answer
from fastlm.train.packed import Tuning, open_tuning
from fastlm.train.reference import ReferencePass, reference_logprobs, with_reference
from fastlm.train.run import (
    cache_folder,
    compiled_step,
    finish,
    resume_or_create,
    say_start,
    train_steps,
)


@parallel.under_torchrun
def dpo(cfg: DpoConfig) -> int:
    """Train a model on preferences as cfg says; returns the process's exit code."""
    check_loss(cfg)
    tuning = open_tuning(cfg, load_preferences, group=2, share=cfg.share_prompt)
    cfg, device, model = tuning.cfg, tuning.device, tuning.model
    training_logprobs = compiled_step(cfg, device, model, model.logprobs)

    def logprobs(batch: PackedBatch) -> Tensor:
        # validation compiles nothing more
        function = training_logprobs if torch.is_grad_enabled() else model.logprobs
        with autocast(device):
            return function(batch.x, batch.y, max_counted=tuning.max_counted, **batch.layout())

    facts = tuning.facts
    cache = cache_folder(cfg.cache)
    console = parallel.console()
    reference = ReferencePass(logprobs, facts["start_hash"], cache, device, console)
    reference_train, reference_held_out = reference_of(tuning, reference)
    name = f"dpo-{Path(cfg.model).name}"
    run = resume_or_create("dpo", cfg, device, model, tuning.tokenizer, facts, name)
    say_start(run, tuning.described())

    def loss(batch: PackedBatch, reference_logps: Tensor) -> dict[str, Tensor]:
        return sums(cfg, batch, logprobs(batch), reference_logps)

    def validate() -> dict[str, float]:
        held_out = tuning.held_out_batches()
        pairs = ((with_reference(b, reference_held_out), b.units // 2) for b in held_out)
        return loop.validate(loss, pairs, device)

    steps = batches(tuning, run.state["position"], reference_train)
    outcome = train_steps(run, steps, loss, validate, tuning.flops_per_token())
    export = f"fastlm export {run.folder} --to DIR"
    next_commands = {
        f"fastlm chat {run.folder}": "talk to this model",
        export: "a folder that transformers, vLLM and llama.cpp load",
    }
    return finish(run, outcome, lambda: say_result(run, outcome.monitor), next_commands)


def check_loss(cfg: DpoConfig) -> None:
    """Raise UserError for an unknown loss, or for label smoothing where the loss has none."""
    check(cfg.loss in LOSSES, f"unknown loss {cfg.loss!r}; {nearest(cfg.loss, LOSSES)}")
    smoothed = [name for name, loss in LOSSES.items() if loss.takes_smoothing]
    check(
        cfg.loss in smoothed or not cfg.label_smoothing,
        f"label_smoothing goes with {' and '.join(smoothed)}, not {cfg.loss}",
    )


def reference_of(
    tuning: Tuning[DpoConfig], reference: ReferencePass
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The reference's log-probabilities of training and of held-out rows, (n_rows, row_len) each.

    None for both where the loss needs none, and for the second where nothing is held out.
    """
    cfg = tuning.cfg
    if not LOSSES[cfg.loss].needs_reference:
        return None, None
    # an epoch meets every row: later steps bring none that is new
    steps = min(cfg.steps, math.ceil(len(tuning.train) / cfg.batch_rows))
    rows = itertools.chain.from_iterable(itertools.islice(tuning.steps(0), steps))
    used = zip(rows, itertools.repeat(True))
    n_batches = steps * (cfg.batch_rows // tuning.micro_rows)
    training = reference_logprobs(reference, tuning.train, used, n_batches, "training")
    if tuning.held_out is None:
        return training, None
    n_batches = math.ceil(len(tuning.held_out) / tuning.micro_rows)
    batches_here = parallel.shard_evenly(tuning.held_out_batches())
    held_out = reference_logprobs(reference, tuning.held_out, batches_here, n_batches, "held-out")
    return training, held_out


def batches(tuning: Tuning, position: int, reference: np.ndarray | None) -> Iterator[loop.Step]:
    """Each step's micro-batches in this process and their number of pairs."""
    for micro_batches in tuning.steps(position):
        real = sum(batch.real for batch in micro_batches)
        slots = sum(batch.x.numel() for batch in micro_batches)
        pairs = sum(batch.units for batch in micro_batches) // 2
        figures = {"tokens": real, "pairs": pairs, "real_share": real / slots}
        yield [with_reference(batch, reference) for batch in micro_batches], pairs, figures


def sums(cfg: DpoConfig, batch: PackedBatch, logps: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """The loss and the figures worth watching, each summed over the batch's pairs.

    logps, reference: (rows, row_len). kl estimates KL(policy || reference) on the answers' tokens:
    their mean of e^d - 1 - d, d = reference - logps (Schulman 2020, Approximating KL divergence,
    k3); on text that the policy did not write it is a distance, not the true divergence.
    """
    member = membership(batch.unit, batch.units)
    policy = sum_per_answer(logps.flatten(), member)
    lengths = member.sum(1).view(-1, 2)
    pairs = Pairs(policy, sum_per_answer(reference.flatten(), member), lengths)
    losses, rewards = LOSSES[cfg.loss].of(pairs, cfg)
    policy = policy.detach()
    rewards = rewards.detach()
    margins = rewards[:, 0] - rewards[:, 1]
    figures = {
        "loss": losses.sum(),
        "rewards/accuracies": (1 + margins.sign()).sum() / 2,  # a tie is half right
        "rewards/margins": margins.sum(),
    }
    for side, name in enumerate(("chosen", "rejected")):
        figures[f"rewards/{name}"] = rewards[:, side].sum()
        figures[f"logps/{name}"] = policy[:, side].sum()
        figures[f"length/{name}"] = lengths[:, side].sum()
    if LOSSES[cfg.loss].needs_reference:
        d = reference - logps.detach()
        k3 = sum_per_answer((d.expm1() - d).flatten(), member)
        figures["kl"] = (k3 / lengths).mean(1).sum()
    return figures


def say_result(run: loop.Run, monitor: Monitor) -> None:
    """How often and by how much the chosen held-out answers are preferred now."""
    if not monitor.validations:
        return
    first, last = monitor.validations[0], monitor.validations[-1]
    run.say(
        f"Held-out pairs: the chosen answer has the higher reward in "
        f"{last['rewards/accuracies']:.1%}, by {last['rewards/margins']:.3f} on average; "
        f"loss {last['loss']:.4f} ({first['loss']:.4f} at the first validation)"
    )

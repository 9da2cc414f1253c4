"""Direct preference optimization: pairs of answers in, a model that prefers the chosen ones out. The whole stage on one page.

The reference, the model that the run starts from, is needed for its log-probabilities of the answers only. They are computed
in one pass before training, kept in a file, and read back row by row, so that training holds one model.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from fastlm import files
from fastlm.config import DpoConfig
from fastlm.data import IGNORED
from fastlm.data.examples.load import load_preferences
from fastlm.data.examples.packing import PackedBatch, PackedRows
from fastlm.data.prefetch import move
from fastlm.model import compiled
from fastlm.train import distributed, loop, preference, tuning


@distributed.over_processes
def dpo(cfg: DpoConfig) -> int:
    """Train a model on preferences as cfg says; returns the process's exit code (128 + signal number when interrupted)."""
    run = tuning.begin("dpo", cfg, load_preferences, group=2, share=cfg.share_prompt)
    model_logprobs = compiled(run.model.logprobs, run.device) if run.cfg.compile else run.model.logprobs

    def logprobs(batch: PackedBatch) -> Tensor:
        with loop.autocast(run.device):
            function = model_logprobs if torch.is_grad_enabled() else run.model.logprobs  # validation compiles nothing more
            return function(batch.x, batch.y, max_counted=run.max_counted, **batch.layout())

    steps = min(run.cfg.steps, math.ceil(len(run.train) / run.cfg.batch_rows))  # that meet rows not met before
    used = itertools.chain.from_iterable(itertools.islice(run.layouts(0), steps))
    parts = run.cfg.batch_rows // run.micro_rows
    training = reference_logprobs(run, logprobs, run.train, used, steps * parts, "training")
    n_held_out = math.ceil(len(run.held_out or ()) / run.micro_rows)
    held_out = reference_logprobs(run, logprobs, run.held_out, distributed.mine(run.held_out_batches()), n_held_out, "held-out")
    tuning.go_on(run)

    def loss(batch: PackedBatch, reference: Tensor) -> dict[str, Tensor]:
        return sums(run.cfg, batch, logprobs(batch), reference)

    def validate() -> dict[str, float]:
        pairs = ((with_reference(batch, held_out), batch.units // 2) for batch in run.held_out_batches())
        return loop.validate(loss, pairs, run.device)

    started = time.perf_counter()
    stopped, monitor = tuning.train(run, batches(run, training), loss, validate)

    def result() -> None:
        if monitor.validations:
            first, last = monitor.validations[0], monitor.validations[-1]
            run.say(f"Held-out pairs: the chosen answer has the higher reward in {last['rewards/accuracies']:.1%}, "
                    f"by {last['rewards/margins']:.3f} on average; loss {last['loss']:.4f} "
                    f"({first['loss']:.4f} at the first validation)")  # fmt: skip

    return tuning.end(run, "dpo", stopped, monitor, time.perf_counter() - started, result)


def batches(run: tuning.Run, reference: np.ndarray | None) -> Iterator[loop.Step]:
    """Each step's micro-batches in this process and their number of pairs."""
    for parts in run.layouts(run.state["position"]):
        real, pairs = sum(part.real for part in parts), sum(part.units for part in parts) // 2
        figures = {"tokens": real, "pairs": pairs, "real_share": real / sum(part.x.numel() for part in parts)}
        yield [with_reference(part, reference) for part in parts], pairs, figures


def with_reference(batch: PackedBatch, reference: np.ndarray | None) -> tuple[PackedBatch, Tensor]:
    """The batch and the reference's log-probabilities of its targets, (rows, row_len) fp32 (zeros without a reference)."""
    if reference is None:
        return batch, torch.zeros(batch.y.shape)
    rows = torch.from_numpy(reference[batch.numbers.numpy()])  # an empty row's number is -1; none of its slots is counted
    return batch, torch.where(batch.y == IGNORED, 0, rows)


def sums(cfg: DpoConfig, batch: PackedBatch, logps: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """The loss and the figures worth watching, each summed over the batch's pairs. logps, reference: (rows, row_len).

    kl estimates KL(policy || reference) on the answers' tokens: their mean of e^d - 1 - d, d = reference - logps (Schulman
    2020, Approximating KL divergence, k3); on text that the policy did not write it is a distance, not the true divergence.
    """
    member = preference.membership(batch.unit, batch.units)
    policy, start = (preference.of_answers(x.flatten(), member) for x in (logps, reference))
    lengths = member.sum(1).view(-1, 2)
    if cfg.loss == "sigmoid":
        losses, rewards = preference.dpo(policy, start, cfg.beta, cfg.label_smoothing)
    elif cfg.loss == "ipo":
        losses, rewards = preference.ipo(policy, start, cfg.beta)
    elif cfg.loss == "length-normalised":
        losses, rewards = preference.length_normalised(policy, start, lengths, cfg.beta, cfg.label_smoothing)
    else:
        losses, rewards = preference.simpo(policy, lengths, cfg.beta, cfg.margin)
    policy, rewards = policy.detach(), rewards.detach()
    found = {
        "loss": losses.sum(),
        "rewards/accuracies": (1 + (rewards[:, 0] - rewards[:, 1]).sign()).sum() / 2,  # a tie is half right
        "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum(),
    }
    for side, name in enumerate(("chosen", "rejected")):
        found |= {f"rewards/{name}": rewards[:, side].sum(), f"logps/{name}": policy[:, side].sum(),
                  f"length/{name}": lengths[:, side].sum()}  # fmt: skip
    if cfg.loss != "simpo":
        d = reference - logps.detach()
        found["kl"] = (preference.of_answers((d.expm1() - d).flatten(), member) / lengths).mean(1).sum()
    return found


def reference_logprobs(
    run: tuning.Run, logprobs: Callable[[PackedBatch], Tensor], rows: PackedRows | None, used: Iterable[PackedBatch],
    n_batches: int, name: str,
) -> np.ndarray | None:  # fmt: skip
    """log p of each target by the model that the run starts from, (n_rows, row_len) fp32, NaN in rows that are not used.

    used: this process's of the n_batches batches of the run, one at a time. They are scored as they come in training and by
    the same program, which is why gradients stay on: so the first step's rewards are 0. What the file for this model and
    these rows holds already is not computed again, nor is what another process computes.
    """
    if rows is None or run.cfg.loss == "simpo":
        return None
    key = hashlib.sha256(f"{run.state['start_hash']} {rows.row_len} {rows.rows} {run.device.type}".encode())
    for array in (rows.ids, rows.counted, rows.shared):
        key.update(np.ascontiguousarray(array).data)
    file = loop.cache_folder(run.cfg.cache) / f"reference-{key.hexdigest()[:16]}.npy"
    found = np.load(file) if file.is_file() else np.full((len(rows), rows.row_len), np.nan, np.float32)
    made, here = 0, n_batches // distributed.ranks()[1]
    for batch in track(used, f"reference, {name} pairs", here, console=run.console, transient=True,
                       disable=not run.console.is_terminal):  # fmt: skip
        real = batch.numbers >= 0
        at = batch.numbers[real].numpy()
        if np.isnan(found[at]).any():
            found[at] = logprobs(move(batch, run.device)).detach().cpu()[real].numpy()
            made += 1
    made = sum(distributed.gathered(made))
    if made:
        found = distributed.joined(found)
        if distributed.first():
            files.write_array(file, found)
    run.say(f"Reference: log-probabilities of the {name} pairs, {made:,} of {n_batches:,} batches computed, the rest kept")
    return found

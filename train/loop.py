"""What the stages share: accumulate, clip, step, validate, stop on a signal.

The loop itself is the stage's.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from rich.console import Console
from torch import Tensor, nn

from fastlm.config import OptimConfig, StageConfig
from fastlm.data.prefetch import move
from fastlm.evaluation.score import perplexity
from fastlm.kernels import updates
from fastlm.model import Transformer
from fastlm.monitor import Monitor
from fastlm.parts import local
from fastlm.tokenizer import Tokenizer
from fastlm.train import parallel
from fastlm.train.loss_scale import LossScale
from fastlm.train.optim import Optimizer, schedule
from fastlm.train.saving import Saver

# Signals that end a run after its step, saved; those that this system has.
STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]

# A micro-batch to sums over what is counted in it (targets, or pairs): "loss", and whatever else is
# worth logging.
Loss = Callable[..., dict[str, Tensor]]
# A step's micro-batches in this process, what is counted in them, and figures for the log: "tokens"
# (real ones), and more.
Step = tuple[list[tuple], int, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What a stage trains, where, and how far it has come.

    lock: held by the main process while the run's folder is its own. loss_scale: None where matmuls
    do not run in fp16. state: plain values that go into every checkpoint; the loop keeps it up to
    date.
    """

    stage: str
    cfg: StageConfig
    device: torch.device
    folder: Path
    lock: FileLock | None
    console: Console
    model: Transformer
    tokenizer: Tokenizer
    optimizers: list[Optimizer]
    loss_scale: LossScale | None
    state: dict[str, Any]

    def say(self, text: str, **style: Any) -> None:
        """Print a line as it is, from the main process."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True, **style)


def accumulate(
    loss: Loss, micro_batches: Iterable[tuple], n_counted: int, scale: Tensor | None = None
) -> dict[str, Tensor]:
    """Backward passes of one step.

    Gradients of sum(loss) / n_counted, whatever the micro-batches. Returns all the means.

    n_counted: what is counted in the whole step, of all processes, so that a micro-batch with few
    of them weighs little and one with none weighs nothing. The means are then this process's part
    of the step's. scale: by which the gradients, and not the means, are multiplied.
    """
    totals: dict[str, Tensor] = {}
    given = list(micro_batches)
    for number, micro_batch in enumerate(given, 1):
        with parallel.micro_batch(last=number == len(given)):
            means = {name: part / max(1, n_counted) for name, part in loss(*micro_batch).items()}
            (means["loss"] if scale is None else means["loss"] * scale).backward()
        totals = {name: part.detach() + totals.get(name, 0) for name, part in means.items()}
    assert totals, "a step has at least one micro-batch"
    return totals


class Clipping(NamedTuple):
    """What the gradients came to, as numbers on the device."""

    norm: Tensor
    factor: (
        Tensor | None
    )  # by which the optimizers multiply every gradient that they read (None: 1)
    found_inf: Tensor  # 1 where the norm is not finite, else 0


def clip(model: nn.Module, max_norm: float, grad_scale: Tensor | None = None) -> Clipping:
    """The global norm of the gradients, and the factor that scales them down to max_norm (0: leaves
    them).

    As torch.nn.utils.clip_grad_norm_, but the gradients stay as they are: the optimizers read them
    anyway. grad_scale: by how much the loss was too large when it was differentiated; the factor
    takes it out again, and the norm is without it.
    """
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    if parallel.shards(model):
        grads = [parallel.norms_of_shards(model, updates.global_norm(grads, math.inf)[0])]
    norm, factor, found_inf = updates.global_norm(grads, max_norm or math.inf, grad_scale).unbind()
    return Clipping(norm, factor if max_norm or grad_scale is not None else None, found_inf)


def step_all(
    optimizers: list[Optimizer],
    step: int,
    steps: int,
    o: OptimConfig,
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> float:
    """One step of every optimizer at the schedule's learning rate; gradients are then gone.

    Returns the schedule's share.

    factor as in Clipping; found_inf: where it is not 0 nothing is changed (None: as if it were 0).
    """
    share = schedule(step, steps, o)
    for optimizer in optimizers:
        optimizer.step(share, factor, found_inf)
        optimizer.zero_grad()
    return share


@torch.no_grad()
def validate(
    loss: Loss, batches: Iterable[tuple[tuple, int]], device: torch.device
) -> dict[str, float]:
    """Means over everything counted in the batches, each with its number of those (added up in
    fp64, read back once).

    Of several processes each takes its share of the batches.
    """
    totals: dict[str, Tensor] = {}
    counted = 0
    for (micro_batch, n_counted), mine in parallel.shard_evenly(batches):
        sums = loss(*move(micro_batch, device))
        if mine:
            counted += n_counted
            totals = {name: part.double() + totals.get(name, 0) for name, part in sums.items()}
    parts = parallel.all_gather(({name: total.item() for name, total in totals.items()}, counted))
    counted = sum(number for _, number in parts)
    names = dict.fromkeys(
        name for found, _ in parts for name in found
    )  # a process may have had no batch
    return {
        name: sum(found.get(name, 0.0) for found, _ in parts) / max(1, counted) for name in names
    }


def with_perplexity(means: dict[str, float]) -> dict[str, float]:
    """The means and exp(loss), where the loss is nats per token."""
    return means | {"perplexity": perplexity(means["loss"])} if means else means


def train(
    run: Run,
    batches: Iterator[Step],
    loss: Loss,
    validate: Callable[[], dict[str, float]],
    monitor: Monitor,
) -> int:
    """The steps of a stage, from state["step"] to cfg.steps: train, log, validate, save.

    validate: the means over the held-out data, of which "loss" tells the best checkpoint (empty:
    nothing is held out). Returns the number of the signal that stopped it, or 0; everything is
    saved then.
    """
    cfg, model, state = run.cfg, run.model, run.state
    saver = Saver(run)
    scale = None if run.loss_scale is None else run.loss_scale.scale
    stop = 0
    with stop_signals() as stopped:
        if state["step"] == 0 and cfg.validate_every:
            monitor.validation(0, validate())  # what the start alone is worth
            parallel.reshard(model)
        for step in range(state["step"], cfg.steps):
            parallel.note(f"reads the rows of step {step + 1}")
            micro_batches, n_counted, figures = next(batches)
            n_counted, figures = parallel.all_reduce_counts(n_counted, figures)
            parallel.note(f"computes step {step + 1}")
            means = parallel.all_reduce_means(accumulate(loss, micro_batches, n_counted, scale))
            clipping = clip(model, cfg.optim.clip_norm, scale)
            found_inf = None if run.loss_scale is None else clipping.found_inf
            share = step_all(run.optimizers, step, cfg.steps, cfg.optim, clipping.factor, found_inf)
            if run.loss_scale is not None:
                means["loss_scale"] = run.loss_scale.scale.clone()
                run.loss_scale.update(clipping.found_inf)
            done = step + 1
            state["step"] = done
            state["position"] += cfg.batch_rows
            state["tokens"] += figures["tokens"]
            state["validation_loss"] = None
            figures["tokens"] = state["tokens"]
            monitor.step(done, means, clipping.norm, share * cfg.optim.lr, figures)

            if due(done, cfg.validate_every, cfg.steps):
                monitor.flush()
                held_out = validate()
                parallel.reshard(model)
                monitor.validation(done, held_out)
                state["validation_loss"] = held_out.get("loss")
            # a signal to one process stops all, after the same step
            stop, writing = parallel.all_reduce_max(stopped(), saver.is_writing())
            if not writing:
                saver.publish()
            if due(done, cfg.checkpoint_every, cfg.steps) or stop or saver.improved():
                monitor.flush()
                if run.loss_scale is not None:
                    state["loss_scale"] = run.loss_scale.values()
                saver.save()
                monitor.restart_clock()
            if stop:
                break
        monitor.flush()
        saver.wait()
    return stop


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps (0: never) and at the end happens after
    `done` steps.
    """
    return done == steps or (every > 0 and done % every == 0)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """A signal to stop only sets a flag; the callable returns its number once one came, else 0.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1 (a batch system's warning).
    A second Ctrl-C interrupts at once.
    """
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

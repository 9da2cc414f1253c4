"""What the stages share: accumulate, clip, step, validate, stop on a signal. The loop itself is the stage's."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import checkpoint
from fastlm.attention import choose
from fastlm.config import OptimConfig, StageConfig
from fastlm.data.prefetch import move
from fastlm.errors import UserError
from fastlm.model import Transformer, keep_what_fits
from fastlm.monitor import Monitor, perplexity
from fastlm.options import to_toml
from fastlm.train import distributed
from fastlm.train.optim import Optimizer, named_state, schedule

# A micro-batch to sums over what is counted in it (targets, or pairs): "loss", and whatever else is worth logging.
Loss = Callable[..., dict[str, Tensor]]
# A step's micro-batches in this process, what is counted in them, and figures for the log: "tokens" (real ones), and more.
Step = tuple[list[tuple], int, dict[str, Any]]


def choose_run(out: str, name: str) -> Path:
    """The new run's folder: `out`, which must not hold another run, or the first free runs/NAME, runs/NAME-2, ...

    Of several processes the first chooses for all: it may write there before the others look.
    """
    return distributed.by_first(partial(free_run, out, name))


def free_run(out: str, name: str) -> Path:
    if out:
        path = Path(out)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{out} is not empty: it may hold another run; choose another --out, or --resume {out}")
        return path
    free = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return next(path for path in free if not path.exists())


def make_folder(run: Path, cfg: StageConfig) -> None:
    """The run's folder, with all that was set in it."""
    if distributed.first():
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomic(run / "config.toml", to_toml(dataclasses.replace(cfg, resume="")))


def cache_folder(cache: str) -> Path:
    """Where tokenised data is kept: the folder given, else fastlm in the user's cache folder."""
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on GPUs that have it; fp32 elsewhere (bf16 matmuls are slower than fp32 on most CPUs)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=matmul_dtype(device) == torch.bfloat16)


def matmul_dtype(device: torch.device) -> torch.dtype:
    """What autocast() makes of the matmuls."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def attention_backend(cfg: StageConfig, device: torch.device) -> str:
    """The backend that cfg names, or that auto takes: decided here, once, as a compiled step cannot look for packages."""
    return choose(device.type, matmul_dtype(device))[0] if cfg.attention == "auto" else cfg.attention


def settle_memory(model: Transformer, device: torch.device, tokens: int) -> None:
    """What a step of so many tokens keeps for its backward on this device: decided here, once, as the backend is."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        keep_what_fits(model, tokens, memory, matmul_dtype(device).itemsize)


def accumulate(loss: Loss, micro_batches: Iterable[tuple], n_counted: int) -> dict[str, Tensor]:
    """Backward passes of one step: gradients of sum(loss) / n_counted, whatever the micro-batches. Returns all the means.

    n_counted: what is counted in the whole step, of all processes, so that a micro-batch with few of them weighs little and
    one with none weighs nothing. The means are then this process's part of the step's.
    """
    totals: dict[str, Tensor] = {}
    for micro_batch in micro_batches:
        means = {name: part / max(1, n_counted) for name, part in loss(*micro_batch).items()}
        means["loss"].backward()
        totals = {name: part.detach() + totals.get(name, 0) for name, part in means.items()}
    assert totals, "a step has at least one micro-batch"
    return totals


def clip(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to the global norm max_norm (0: leave them). Returns the norm before."""
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))


def step_all(optimizers: list[Optimizer], step: int, steps: int, o: OptimConfig) -> float:
    """One step of every optimizer at the schedule's learning rate; gradients are then gone. Returns the schedule's share."""
    share = schedule(step, steps, o)
    for optimizer in optimizers:
        for group in optimizer.groups:
            group["lr"] = group["peak_lr"] * share
        optimizer.step()
        optimizer.zero_grad()
    return share


@torch.no_grad()
def validate(loss: Loss, batches: Iterable[tuple[tuple, int]], device: torch.device) -> dict[str, float]:
    """Means over everything counted in the batches, each with its number of those (added up in fp64, read back once).

    Of several processes each takes its share of the batches.
    """
    totals: dict[str, Tensor] = {}
    counted = 0
    for micro_batch, n_counted in distributed.mine(batches):
        counted += n_counted
        sums = loss(*move(micro_batch, device))
        totals = {name: part.double() + totals.get(name, 0) for name, part in sums.items()}
    parts = distributed.gathered(({name: total.item() for name, total in totals.items()}, counted))
    counted = sum(number for _, number in parts)
    names = dict.fromkeys(name for found, _ in parts for name in found)  # a process may have had no batch
    return {name: sum(found.get(name, 0.0) for found, _ in parts) / max(1, counted) for name in names}


def with_perplexity(means: dict[str, float]) -> dict[str, float]:
    """The means and exp(loss), where the loss is nats per token."""
    return means | {"perplexity": perplexity(means["loss"])} if means else means


def resume(place: Path, model: nn.Module, optimizers: list[Optimizer], fresh: dict[str, Any], steps: int) -> dict[str, Any]:
    """Load a checkpoint for going on with the run it belongs to; `fresh` is the state that a new run would start with."""
    state = checkpoint.load(place, model, named_state(optimizers))
    for key in ("tokenizer_hash", "train_tokens", "start_hash"):
        if state.get(key) != fresh.get(key):
            raise UserError(
                f"what the run started from has changed since {place} was written "
                f"({key} was {state.get(key)} and is {fresh.get(key)}); restore it, or start a new run"
            )
    if state["step"] >= steps:
        raise UserError(f"{place} has done its {state['step']} steps; pass --steps with a larger number")
    return fresh | state


def train(
    cfg: StageConfig,
    run: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    state: dict[str, Any],
    batches: Iterator[Step],
    loss: Loss,
    validate: Callable[[], dict[str, float]],
    monitor: Monitor,
) -> int:
    """The steps of a stage, from state["step"] to cfg.steps: train, log, validate, save. state is kept up to date.

    validate: the means over the held-out data, of which "loss" tells the best checkpoint (empty: nothing is held out).
    Returns the number of the signal that stopped it, or 0; everything is saved then.
    """
    folder, stop = run / "checkpoints", 0
    with stop_signals() as stopped:
        if state["step"] == 0 and cfg.validate_every:
            monitor.validation(0, validate())  # what the start alone is worth
        for step in range(state["step"], cfg.steps):
            micro_batches, n_counted, figures = next(batches)
            n_counted, figures = distributed.whole_step(n_counted, figures)
            means = distributed.add(accumulate(loss, micro_batches, n_counted))
            distributed.add_gradients(model)
            norm = clip(model, cfg.optim.clip_norm)
            share = step_all(optimizers, step, cfg.steps, cfg.optim)
            done = step + 1
            state |= {"step": done, "position": state["position"] + cfg.batch_rows, "validation_loss": None}
            state["tokens"] += figures["tokens"]
            monitor.step(done, means, norm, share * cfg.optim.lr, figures | {"tokens": state["tokens"]})

            if due(done, cfg.validate_every, cfg.steps):
                monitor.flush()
                found = validate()
                monitor.validation(done, found)
                state["validation_loss"] = found.get("loss")
            stop = distributed.largest(stopped())  # a signal to one process stops all, after the same step
            if distributed.first() and (due(done, cfg.checkpoint_every, cfg.steps) or stop or improved(state, folder)):
                monitor.flush()
                checkpoint.save(folder, model, named_state(optimizers), state)
                checkpoint.prune(folder, cfg.keep_checkpoints)
                monitor.restart_clock()
            if stop:
                break
        monitor.flush()
    return distributed.largest(stop)  # where each waits for the last checkpoint to be there


def improved(state: dict[str, Any], folder: Path) -> bool:
    """Whether this step's validation, if there was one, beats those of the checkpoints in the folder."""
    return state["validation_loss"] is not None and state["validation_loss"] < checkpoint.best(folder)[1]


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps (0: never) and at the end happens after `done` steps."""
    return done == steps or (every > 0 and done % every == 0)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM only set a flag; the callable returns the signal's number once one came, else 0.

    A second Ctrl-C interrupts at once.
    """
    seen: list[int] = []

    def note(number: int, frame) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

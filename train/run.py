"""How any stage begins, resumes and ends: its folder, its state, its first and last words."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpoint_activations

from fastlm import checkpoint, files
from fastlm.attention_backend import Choice, choose
from fastlm.config import ModelConfig, StageConfig
from fastlm.config.toml import to_toml
from fastlm.data.prefetch import prefetch
from fastlm.errors import UserError, check
from fastlm.model import Transformer, keep_what_fits
from fastlm.model.memory import keep_attention
from fastlm.monitor import Monitor, sparkline
from fastlm.runtime import (
    compiled,
    compiled_in_graphs,
    matmul_dtype,
    peak_gib,
    pick_device,
    replays_graphs,
    set_deterministic,
)
from fastlm.tokenizer import Tokenizer
from fastlm.train import loop, parallel
from fastlm.train.loop import Run
from fastlm.train.loss_scale import loss_scale
from fastlm.train.optim import make_optimizers, named_state

# What must be the same when a run goes on: of its start, that is, not of its options.
FACTS = ("tokenizer_hash", "train_tokens", "start_hash")


def check_start(cfg: StageConfig) -> torch.device:
    """The device of a run, after what can be said before anything is loaded.

    Raises UserError where the processes cannot share the rows, the run to resume has no checkpoint,
    or the new run's folder holds something.
    """
    device = pick_device(cfg.device)
    set_deterministic(cfg.deterministic, device)
    parallel.micro_rows(cfg)
    if cfg.resume:
        checkpoint.locate(cfg.resume)
    elif cfg.out:
        check_empty(Path(cfg.out))
    return device


def check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} is not empty: it may hold another run; choose another --out, or --resume "
            f"{folder}"
        )


def resume_or_create(
    stage: str,
    cfg: StageConfig,
    device: torch.device,
    model: Transformer,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    name: str,
) -> Run:
    """A run ready for its steps: a new one, or the one that cfg.resume names, where it stopped.

    facts: what is noted of the run beside the model and its tokenizer: train_tokens, attention, and
    more. A run goes on only where what it started from (FACTS) is the same.
    name: of the new run's folder in runs/, where --out names none.
    """
    parallel.reshard(model)
    optimizers = make_optimizers(model, cfg.optim)
    state = {
        "step": 0,
        "position": 0,
        "tokens": 0,
        "validation_loss": None,
        "model": dataclasses.asdict(model.config),
        "tokenizer": tokenizer.name,
        "tokenizer_hash": tokenizer.hash,
        **facts,
    }
    if cfg.resume:
        folder = parallel.settle_folder(Path(cfg.resume), model, lambda: Path(cfg.resume))
        lock = locked(folder)
        place, saved, problems = newest_common(folder)
        for problem in problems:
            parallel.console().print(
                f"Passed over: {problem}", highlight=False, markup=False, soft_wrap=True
            )
        check_facts(place, saved, state, cfg.steps)
        checkpoint.restore(place, model, named_state(model, optimizers))
        state |= saved | {"attention": state["attention"]}  # that of this machine
    else:
        torch.manual_seed(cfg.seed)
        folder = parallel.broadcast_from_main(partial(claim_folder, cfg.out, name))
        folder = parallel.settle_folder(folder, model, partial(claim_folder, str(folder), name))
        lock = locked(folder)
    if parallel.writes():
        text = to_toml(dataclasses.replace(cfg, resume=""))
        files.remove_leftovers(folder / "checkpoints")
        files.write_text(folder / "config.toml", text)
    in_fp16 = matmul_dtype(device) == torch.float16
    return Run(
        stage,
        cfg,
        device,
        folder,
        lock,
        parallel.console(),
        model,
        tokenizer,
        optimizers,
        loss_scale(device, state.get("loss_scale")) if in_fp16 else None,
        state,
    )


def newest_common(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """As checkpoint.newest_whole(); of several machines' folders the last that all have."""
    place, saved, problems = parallel.from_writer(lambda: checkpoint.newest_whole(folder))
    step = min(parallel.all_gather(saved["step"]))
    if saved["step"] != step:
        place = checkpoint.place_of(folder / "checkpoints", step)
        saved = checkpoint.read_state(place)
    return place, saved, problems


def say_start(run: Run, words: str) -> None:
    """Where the run is, how long it is, in the stage's own words, and where it goes on."""
    step = run.state["step"]
    run.say(f"Run:   {run.folder}, {words}" + (f", from step {step}" if step else ""))
    if run.device.type == "cuda":
        run.say(f"Attention: {run.state['attention']}")


def claim_folder(out: str, name: str) -> Path:
    """A new folder for a run: `out`, or the first free one of runs/NAME, runs/NAME-2, ...

    The folder is made here, so that no other process can choose it too.
    """
    if out:
        folder = Path(out)
        check_empty(folder)
        make_folder(folder, exist_ok=True)
        return folder
    for n in itertools.count(1):
        folder = Path("runs") / (name if n == 1 else f"{name}-{n}")
        if make_folder(folder):
            return folder
    raise AssertionError("unreachable: there are as many names as numbers")


def make_folder(folder: Path, exist_ok: bool = False) -> bool:
    """Whether the folder could be made; False where it is there already."""
    with files.disk_errors("write", folder, "choose another --out"):
        try:
            files.make_folder(folder.parent)
            folder.mkdir(exist_ok=exist_ok)
        except FileExistsError:
            return False
    return True


def locked(folder: Path) -> FileLock | None:
    """The lock of a run's folder, in the main process; it ends with its owner however that ends."""
    if not parallel.writes():
        return None
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{folder} is in use: another fastlm trains in it; wait for it, or start a new run"
        ) from None
    except OSError as error:
        raise files.DiskError(error, "write", folder / ".lock", "") from None
    return lock


def check_facts(place: Path, saved: dict[str, Any], fresh: dict[str, Any], steps: int) -> None:
    """Raise UserError where a run cannot go on from `place` with what is there today."""
    for key in FACTS:
        if saved.get(key) != fresh.get(key):
            raise UserError(
                f"what the run started from has changed since {place} was written ({key} was "
                f"{saved.get(key)} and is {fresh.get(key)}); restore it, or start a new run"
            )
    if saved["step"] >= steps:
        raise UserError(
            f"{place} has done its {saved['step']} steps; pass --steps with a larger number"
        )


def cache_folder(cache: str) -> Path:
    """Where tokenised data is kept: the folder given, else fastlm in the user's cache folder."""
    if cache:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def choose_attention(
    cfg: StageConfig, device: torch.device, config: ModelConfig, packed: bool
) -> Choice:
    """The attention that cfg names, or that auto takes: decided once, before anything is compiled.

    packed: whether the stage's rows hold documents to keep apart.
    """
    check(
        not cfg.deterministic or cfg.attention in ("auto", "torch"),
        f"attention {cfg.attention} is not deterministic; leave --attention or --deterministic out",
    )
    name = "torch" if cfg.deterministic else cfg.attention
    choice = choose(name, device, matmul_dtype(device), config)
    check(
        choice.backend != "xformers" or not packed or not cfg.compile,
        "xformers cannot be compiled with packed documents; leave --compile or --attention out",
    )
    return choice


def compiled_step(
    cfg: StageConfig, device: torch.device, model: Transformer, function: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """The model's function as the training step calls it: with --compile compiled.

    A small model's is replayed as CUDA graphs. In several processes the blocks are compiled one by
    one: what is gathered before a block and added up behind it cannot be part of one program.
    """
    if parallel.joined():
        if cfg.compile:
            compile_blocks(model, device)
        return parallel.training_step(cfg, model, function)
    if not cfg.compile:
        return function
    if not replays_graphs(model, device):
        return compiled(function, device)
    parallel.console().print("Step:  compiled, replayed as CUDA graphs", highlight=False)
    return compiled_in_graphs(function, device, model)


def compile_blocks(model: Transformer, device: torch.device) -> None:
    """Compile each block's training pass, which may recompute activations inside.

    Others stay as they are.
    """
    for block in model.blocks:
        plain = block.forward
        training = recomputing(plain) if model.checkpoint_activations else plain
        block.forward = either(compiled(training, device), plain)
    model.checkpoint_activations = False


def recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The pass, of which only attention is kept for the backward pass."""
    return lambda *args: checkpoint_activations(
        forward, *args, use_reentrant=False, context_fn=keep_attention
    )


def either(training: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """One function where there will be a backward pass, another where not."""
    return lambda *args: (training if torch.is_grad_enabled() else other)(*args)


def settle_memory(model: Transformer, device: torch.device, tokens: int) -> None:
    """What a pass over so many tokens keeps for its backward.

    Decided once, before anything is compiled.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        keep_what_fits(model, tokens, memory, matmul_dtype(device).itemsize)


@dataclass(frozen=True)
class Outcome:
    """How the steps ended: the number of the signal that stopped them, or 0."""

    stopped: int
    monitor: Monitor
    seconds: float


def train_steps(
    run: Run,
    batches: Iterator[loop.Step],
    loss: loop.Loss,
    validate: Callable[[], dict[str, float]],
    flops_per_token: float,
) -> Outcome:
    """All steps that are left; the arguments as in loop.train()."""
    started = time.perf_counter()
    with Monitor(
        run.folder,
        run.cfg.steps,
        run.state,
        flops_per_token,
        run.device,
        run.console,
        run.cfg.tensorboard,
    ) as monitor:
        stopped = loop.train(run, prefetch(batches, run.device), loss, validate, monitor)
    return Outcome(stopped, monitor, time.perf_counter() - started)


def finish(
    run: Run, outcome: Outcome, result: Callable[[], None], next_commands: dict[str, str]
) -> int:
    """The last words of a run, and its exit code: 128 + the signal's number where one stopped it.

    result: says what the stage has reached. next_commands: command -> what it is for.
    """
    if run.lock is not None:
        run.lock.release()
    if outcome.stopped:
        name = signal.Signals(outcome.stopped).name
        place = checkpoint.locate(run.folder)
        run.say(f"Stopped by {name} after step {run.state['step']}; saved {place}. Go on with:")
        run.say(f"  fastlm {run.stage} --resume {run.folder}")
        return 128 + outcome.stopped
    with parallel.gathered(run.model):
        if not parallel.is_main_process():
            return 0
        run.say(f"\nTraining loss   {sparkline(outcome.monitor.losses)}")
        result()
    run.say(f"Time {outcome.seconds:.0f} s, peak memory {peak_gib(run.device):.1f} GiB")
    run.say(f"\nCheckpoint: {checkpoint.locate(run.folder)}\nNext:")
    for command, purpose in next_commands.items():
        run.say(f"  {command:58} {purpose}")
    return 0

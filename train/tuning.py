"""What SFT and DPO share: the model to start from, the examples in rows, and how a run begins and ends."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console

from fastlm import checkpoint
from fastlm.config import TuningConfig, check
from fastlm.data.examples.load import pack_examples
from fastlm.data.examples.packing import PackedBatch, PackedRows, packed_batch, packed_epoch
from fastlm.data.examples.report import Examples
from fastlm.data.prefetch import prefetch
from fastlm.load import open_model
from fastlm.model import Transformer, count_parameters, pick_device, training_flops_per_token
from fastlm.monitor import Monitor, peak_gib, sparkline
from fastlm.tokenizer import Tokenizer
from fastlm.train import distributed, loop
from fastlm.train.optim import Optimizer, make_optimizers

MAX_LEN = 512  # of an example, where the options do not say

C = TypeVar("C", bound=TuningConfig)


@dataclass(frozen=True)
class Run(Generic[C]):
    """A run about to start: its options with the number of steps settled, and everything that the loop needs."""

    cfg: C
    device: torch.device
    folder: Path
    console: Console
    model: Transformer
    tokenizer: Tokenizer
    train: PackedRows
    held_out: PackedRows | None
    optimizers: list[Optimizer]
    state: dict[str, Any]

    def say(self, text: str, **style: Any) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True, **style)

    @property
    def micro_rows(self) -> int:
        """Rows of one pass in this process."""
        return distributed.micro_rows(self.cfg)

    @property
    def max_counted(self) -> int:
        """Targets that a micro-batch may have."""
        return self.micro_rows * max(p.most_counted for p in (self.train, self.held_out) if p is not None)

    def layouts(self, start: int) -> Iterator[list[PackedBatch]]:
        """This process's micro-batches of each step from the row `start` on."""
        for first in itertools.count(start, self.cfg.batch_rows):
            rows = distributed.mine(range(first, first + self.cfg.batch_rows, self.micro_rows))
            yield [packed_batch(self.train, row, self.micro_rows, self.cfg.seed) for row in rows]

    def held_out_batches(self) -> Iterator[PackedBatch]:
        return packed_epoch(self.held_out, self.micro_rows) if self.held_out is not None else iter(())


def begin(stage: str, cfg: C, load: Callable[..., Examples], group: int = 1, share: bool = False) -> Run[C]:
    """Open the model and the examples, pack them, settle the steps, load the checkpoint to go on from, and say so."""
    check(bool(cfg.model), f"which model? give a run or a Hugging Face folder: fastlm {stage} runs/pretrain-demo --data FILE")
    check(bool(cfg.data), f"which data? give a .jsonl file or a data set: fastlm {stage} {cfg.model} --data FILE.jsonl")
    device = pick_device(cfg.device)
    distributed.micro_rows(cfg)  # says so now if the processes cannot share the rows
    resumed = checkpoint.locate(cfg.resume) if cfg.resume else None
    folder = Path(cfg.resume) if cfg.resume else loop.choose_run(cfg.out, f"{stage}-{Path(cfg.model).name}")
    model, tokenizer = open_model(cfg.model, device, cfg.tokenizer)
    cfg = with_lengths(cfg, model.config.max_seq_len, group)
    with distributed.in_turn():
        cache = loop.cache_folder(cfg.cache)
        examples = load(cfg.data, tokenizer, cfg.max_len, cfg.template, cfg.bad_rows, cfg.held_out, cache)
    train, held_out = pack_examples(examples, cfg.row_len, group, share)
    cfg = dataclasses.replace(cfg, steps=cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_rows))

    model.train()
    model.checkpoint_activations = cfg.checkpoint_activations
    model.attention_backend = loop.attention_backend(cfg, device)
    optimizers = make_optimizers(model, cfg.optim)
    state: dict[str, Any] = {
        "step": 0, "position": 0, "tokens": 0, "train_tokens": train.real_slots, "validation_loss": None,
        "model": dataclasses.asdict(model.config), "tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash,
        "start": cfg.model, "start_hash": model_hash(model), "template": examples.report.template,
    }  # fmt: skip
    if resumed is None:
        torch.manual_seed(cfg.seed)
    run = Run(cfg, device, folder, distributed.console(), model, tokenizer, train, held_out, optimizers, state)
    what = "pairs" if group > 1 else "examples"
    run.say(f"Model: {cfg.model}, {count_parameters(model.config) / 1e6:.1f}M parameters on {distributed.devices(device)}")
    run.say(f"Data:  {examples.report.line()}")
    run.say(f"Rows:  {len(examples.train) // group:,} training {what} in {len(train):,} rows of {train.row_len}, "
            f"{train.real_share:.1%} of the slots real; {len(examples.validation) // group:,} held out")  # fmt: skip
    return run


def with_lengths(cfg: C, longest: int, group: int) -> C:
    """The options with max_len and row_len settled for a model whose texts end at `longest`."""
    check(cfg.max_len <= longest, f"max_len is {cfg.max_len}, but the model's texts end at {longest}; pass --max-len {longest}")
    max_len = cfg.max_len or min(longest, MAX_LEN)
    return dataclasses.replace(cfg, max_len=max_len, row_len=cfg.row_len or max_len * (4 if group > 1 else 1))


def go_on(run: Run) -> None:
    """Make the run's folder, and load the checkpoint where a run is resumed: what the start alone is needed for is done."""
    if run.cfg.resume:
        place = checkpoint.locate(run.cfg.resume)
        run.state.update(loop.resume(place, run.model, run.optimizers, run.state, run.cfg.steps))
    loop.make_folder(run.folder, run.cfg)
    epochs = run.cfg.steps * run.cfg.batch_rows / len(run.train)
    run.say(f"Run:   {run.folder}, {run.cfg.steps} steps of {run.cfg.batch_rows} rows ({epochs:.2f} epochs)"
            + (f", from step {run.state['step']}" if run.state["step"] else ""))  # fmt: skip


def train(
    run: Run, batches: Iterator[loop.Step], loss: loop.Loss, validate: Callable[[], dict[str, float]]
) -> tuple[int, Monitor]:
    """The loop. Returns the signal that stopped it, or 0, and the monitor."""
    cfg, state = run.cfg, run.state
    with Monitor(run.folder, cfg.steps, state["step"], state["tokens"], flops_per_token(run), run.device, run.console,
                 cfg.tensorboard, distributed.ranks()) as monitor:  # fmt: skip
        prepared = prefetch(batches, run.device)
        stopped = loop.train(cfg, run.folder, run.model, run.optimizers, state, prepared, loss, validate, monitor)
    return stopped, monitor


def flops_per_token(run: Run) -> float:
    """Of a real token, on average: the head is multiplied for counted targets only."""
    share = float(run.train.counted.sum()) / max(1, run.train.real_slots)
    shape = dataclasses.replace(run.model.config, vocab_size=max(1, round(run.model.config.vocab_size * share)))
    return training_flops_per_token(shape, round(run.train.real_slots / max(1, len(run.train.ends))))


def end(run: Run, stage: str, stopped: int, monitor: Monitor, seconds: float, result: Callable[[], None]) -> int:
    """The last words: how to go on after a signal, else the result, the checkpoint and what to do next. The exit code."""
    if stopped:
        name = signal.Signals(stopped).name
        run.say(f"Stopped by {name} after step {run.state['step']}; saved {checkpoint.locate(run.folder)}. Go on with:")
        run.say(f"  fastlm {stage} --resume {run.folder}")
        return 128 + stopped
    if not distributed.first():
        return 0
    run.say(f"\nTraining loss   {sparkline(monitor.losses)}")
    result()
    run.say(f"Time {seconds:.0f} s, peak memory {peak_gib(run.device):.1f} GiB")
    run.say(f"\nCheckpoint: {checkpoint.locate(run.folder)}\nNext:")
    for command, purpose in ({
        "sft": {f"fastlm chat {run.folder}": "talk to this model",
                f"fastlm dpo {run.folder} --data FILE.jsonl": "teach it which answers are preferred"},
        "dpo": {f"fastlm chat {run.folder}": "talk to this model",
                f"fastlm export {run.folder} --to DIR": "a folder that transformers, vLLM and llama.cpp load"},
    }[stage].items()):  # fmt: skip
        run.say(f"  {command:58} {purpose}")
    return 0


def model_hash(model: Transformer) -> str:
    """SHA-256 of the parameters, 16 hex digits."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]

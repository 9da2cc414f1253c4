"""Pretraining: text in, language model out. The whole stage on one page."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastlm import checkpoint
from fastlm.bigram import MOST
from fastlm.config import PretrainConfig, check, to_toml
from fastlm.data.batches import row_batch, validation_batches
from fastlm.data.shards import prepare
from fastlm.data.tokens import Tokens, unigram_perplexity
from fastlm.generate import generate
from fastlm.kernels import cpu
from fastlm.model import Transformer, build, count_parameters, pick_device, training_flops_per_token
from fastlm.monitor import Monitor, peak_gib, perplexity, sparkline
from fastlm.tokenizer import Tokenizer, load_tokenizer
from fastlm.train import loop
from fastlm.train.optim import make_optimizers


def pretrain(cfg: PretrainConfig) -> int:
    """Train a model as cfg says; returns the process's exit code (128 + signal number after an interruption)."""
    console = Console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    device = pick_device(cfg.device)
    resumed = checkpoint.locate(cfg.resume) if cfg.resume else None
    run = Path(cfg.resume) if cfg.resume else loop.choose_run(cfg.out, f"pretrain-{Path(cfg.recipe).stem}")
    tokenizer = load_tokenizer(cfg.tokenizer)
    check(
        tokenizer.vocab_size <= cfg.model.vocab_size,
        f"tokenizer {cfg.tokenizer} has {tokenizer.vocab_size} tokens, but model.vocab_size is "
        f"{cfg.model.vocab_size}; pass --model.vocab-size {tokenizer.vocab_size}",
    )
    data = prepare(cfg.data, tokenizer, loop.cache_folder(cfg.cache))
    train, validation = data.train, data.validation
    held_out = validation[: cfg.validation_tokens]
    row_batch(train, 0, cfg.batch_rows, cfg.seq_len, cfg.seed)  # says so now if the text is too short

    torch.manual_seed(cfg.seed)
    counted = cfg.init == "bigram" or (cfg.init == "auto" and not cfg.model.tie_embeddings)
    text = torch.from_numpy(train[:MOST].astype("int64")) if counted and resumed is None else None
    model = build(cfg.model, cfg.seed, device, text, checkpoint_activations=cfg.checkpoint_activations,
                  attention_backend=cfg.attention)  # fmt: skip
    optimizers = make_optimizers(model, cfg.optim)
    # position: rows drawn so far, the one counter of the data order
    state: dict[str, Any] = {"step": 0, "position": 0, "train_tokens": len(train)}
    if resumed is not None:
        state = checkpoint.load(resumed, model, optimizers)
        check(
            (state["tokenizer_hash"], state["train_tokens"]) == (tokenizer.hash, len(train)),
            f"{cfg.data} has changed since {resumed} was written ({state['train_tokens']:,} training tokens then, "
            f"{len(train):,} now); restore the text, or start a new run",
        )
        check(state["step"] < cfg.steps, f"{run} has done its {state['step']} steps; pass --steps with a larger number")
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomic(run / "config.toml", to_toml(dataclasses.replace(cfg, resume="")))
    describe(say, cfg, run, device, len(train), len(validation), state["step"])

    model_loss = loop.compiled(model.loss, device) if cfg.compile else model.loss

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with loop.autocast(device):
            return model_loss(tokens, targets, cfg.z_loss)

    flops = training_flops_per_token(cfg.model, cfg.seq_len)
    monitor = Monitor(run, cfg.steps, state["step"], cfg.batch_rows * cfg.seq_len, flops, device, console, cfg.tensorboard)
    started, micro_rows, nats, saved = time.perf_counter(), cfg.micro_batch_rows or cfg.batch_rows, float("nan"), resumed
    try:
        with loop.stop_signals() as stopped:
            for step in range(state["step"], cfg.steps):
                tokens, targets = row_batch(train, state["position"], cfg.batch_rows, cfg.seq_len, cfg.seed)
                n_counted = int((targets != loop.IGNORE).sum())
                tokens, targets = tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                value = loop.accumulate(loss, zip(tokens.split(micro_rows), targets.split(micro_rows), strict=True), n_counted)
                norm = loop.clip(model, cfg.optim.clip_norm)
                share = loop.step_all(optimizers, step, cfg.steps, cfg.optim)
                done = step + 1
                state |= {"step": done, "position": state["position"] + cfg.batch_rows}
                monitor.step(done, value, norm, share * cfg.optim.lr)

                measured = loop.due(done, cfg.validate_every, cfg.steps)
                if measured:
                    monitor.flush()
                    nats = loop.validate(model.loss, validation_batches(held_out, cfg.seq_len, micro_rows), device)
                    monitor.validation(done, nats)
                improved = measured and nats < checkpoint.best(run / "checkpoints")[1]
                if saved_now := loop.due(done, cfg.checkpoint_every, cfg.steps) or improved or bool(stopped()):
                    monitor.flush()
                    state["validation_nats"] = nats if measured else None
                    saved = save(run, model, optimizers, cfg, tokenizer, state)
                if stopped():
                    break
                if measured or saved_now:
                    monitor.restart_clock()
            monitor.flush()
    finally:
        monitor.close()
    if number := stopped():
        say(f"Stopped by {signal.Signals(number).name} after step {state['step']}; saved {saved}. Go on with:\n"
            f"  fastlm pretrain --resume {run}")  # fmt: skip
        return 128 + number
    report(say, cfg, run, model, tokenizer, train, held_out, nats, monitor, time.perf_counter() - started)
    return 0


def save(
    run: Path, model: Transformer, optimizers: list, cfg: PretrainConfig, tokenizer: Tokenizer, state: dict[str, Any]
) -> Path:
    state |= {"model": dataclasses.asdict(cfg.model), "tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash}
    folder = checkpoint.save(run / "checkpoints", model, optimizers, state)
    checkpoint.prune(run / "checkpoints", cfg.keep_checkpoints)
    return folder


def describe(
    say: Callable[..., None], cfg: PretrainConfig, run: Path, device: torch.device, n_train: int, n_validation: int, start: int
) -> None:
    """What is about to happen, in three lines."""
    tokens = cfg.steps * cfg.batch_rows * cfg.seq_len
    say(f"Model: {cfg.preset}, {count_parameters(cfg.model) / 1e6:.1f}M parameters on {device}, "
        f"{training_flops_per_token(cfg.model, cfg.seq_len) / 1e9:.3f} GFLOP per token")  # fmt: skip
    say(f"Text:  {cfg.data}, {n_train:,} training and {n_validation:,} validation tokens")
    say(f"Run:   {run}, {cfg.steps} steps of {cfg.batch_rows} x {cfg.seq_len} = {tokens:,} tokens "
        f"({tokens / n_train:.2f} epochs), every slot real" + (f", from step {start}" if start else ""))  # fmt: skip
    if device.type == "cpu" and not cpu.available(torch.empty(0)):
        say(f"CPU kernels: {cpu.status()}")


def report(
    say: Callable[..., None], cfg: PretrainConfig, run: Path, model: Transformer, tokenizer: Tokenizer, train: Tokens,
    held_out: Any, nats: float, monitor: Monitor, seconds: float,
) -> None:  # fmt: skip
    """The end of a run: what it reached, beside what counting alone reaches, and what to do next."""
    baseline = unigram_perplexity(train, held_out, tokenizer.vocab_size)
    prompt = torch.as_tensor(held_out[None, : min(32, cfg.seq_len // 2)].astype("int64"))
    sample = generate(model, prompt, 64, temperature=0.7, top_p=0.9, seed=cfg.seed)[0].tolist()
    say("")
    say(f"Training loss   {sparkline(monitor.losses)}")
    say(f"Validation perplexity {perplexity(nats):.2f} on {len(held_out):,} held-out tokens "
        f"(counting single tokens alone gives {baseline:.1f})")  # fmt: skip
    say(f"Time {seconds:.0f} s, peak memory {peak_gib(model.embedding.device):.1f} GiB")
    say("\nSample (the start of the held-out text, then the model's words):")
    say(tokenizer.decode(sample[: prompt.shape[1]]), style="dim", end="")
    say(tokenizer.decode(sample[prompt.shape[1] :]))
    say(f"\nCheckpoint: {checkpoint.locate(run)}\nNext:")
    for command, purpose in {
        f'fastlm generate {run} --prompt "def "': "write with this model",
        f"fastlm pretrain --resume {run} --steps {2 * cfg.steps}": "train on",
        "fastlm pretrain --compile --data FILE.txt": "train on your own text",
        "fastlm doctor": "what runs on this machine, and why",
    }.items():
        say(f"  {command:58} {purpose}")

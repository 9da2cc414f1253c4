"""Pretraining: text in, language model out. The whole stage on one page."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastlm import checkpoint
from fastlm.bigram import MOST
from fastlm.config import PretrainConfig, check
from fastlm.data.batches import row_batch, validation_batches
from fastlm.data.mixture import Mixture
from fastlm.data.prefetch import prefetch
from fastlm.data.shards import prepare
from fastlm.data.tokens import Tokens, unigram_perplexity
from fastlm.generate import generate
from fastlm.kernels import cpu
from fastlm.model import Transformer, build, count_parameters, pick_device, training_flops_per_token
from fastlm.monitor import Monitor, peak_gib, perplexity, showing_bytes, sparkline
from fastlm.options import to_toml
from fastlm.tokenizer import Tokenizer, load_tokenizer
from fastlm.train import loop
from fastlm.train.optim import make_optimizers
from fastlm.train.shortlist import by_frequency, draw


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
    with showing_bytes(console) as progress:
        data = prepare(cfg.data, tokenizer, loop.cache_folder(cfg.cache), progress)
    train, held_out = data.train, data.validation[: cfg.validation_tokens]
    row_batch(train, 0, cfg.batch_rows, cfg.seq_len, cfg.seed)  # says so now if the text is too short

    torch.manual_seed(cfg.seed)
    counted = cfg.init == "bigram" or (cfg.init == "auto" and not cfg.model.tie_embeddings)
    short = candidates(cfg) < cfg.model.vocab_size
    sample = torch.from_numpy(train[:MOST].astype("int64")) if short or counted else None
    model = build(cfg.model, cfg.seed, device, sample if counted and resumed is None else None,
                  checkpoint_activations=cfg.checkpoint_activations, attention_backend=cfg.attention)  # fmt: skip
    optimizers = make_optimizers(model, cfg.optim)
    state: dict[str, Any] = {
        "step": 0, "position": 0, "train_tokens": len(train), "validation_nats": None,
        "model": dataclasses.asdict(cfg.model), "tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash,
    }  # fmt: skip
    if resumed is not None:
        state = loop.resume(resumed, model, optimizers, state, cfg.steps)
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomic(run / "config.toml", to_toml(dataclasses.replace(cfg, resume="")))
    describe(say, cfg, run, device, len(train), len(data.validation), state["step"])

    model_loss = loop.compiled(model.loss, device) if cfg.compile else model.loss

    def loss(tokens: Tensor, targets: Tensor, ids: Tensor | None = None, raised: Tensor | None = None) -> Tensor:
        with loop.autocast(device):
            return model_loss(tokens, targets, cfg.z_loss, ids, raised)

    def validate() -> float:
        return loop.validate(model.loss, validation_batches(held_out, cfg.seq_len, cfg.batch_rows), device)

    ranked = by_frequency(sample, cfg.model.vocab_size) if short and sample is not None else None
    started = time.perf_counter()
    with Monitor(run, cfg.steps, state["step"], cfg.batch_rows * cfg.seq_len, flops_per_token(cfg), device, console,
                 cfg.tensorboard) as monitor:  # fmt: skip
        stopped = loop.train(cfg, run, model, optimizers, state, batches(cfg, train, state["position"], ranked, device),
                             loss, validate, monitor)  # fmt: skip
    if stopped:
        name = signal.Signals(stopped).name
        say(f"Stopped by {name} after step {state['step']}; saved {checkpoint.locate(run)}. Go on with:")
        say(f"  fastlm pretrain --resume {run}")
        return 128 + stopped
    report(say, cfg, run, model, tokenizer, train, held_out, monitor, time.perf_counter() - started)
    return 0


def batches(
    cfg: PretrainConfig, train: Tokens | Mixture, position: int, ranked: Tensor | None, device: torch.device
) -> Iterator[tuple[list[tuple[Tensor, ...]], int]]:
    """Each step's micro-batches on the device and its number of counted tokens: all of them, every slot is real."""
    rows = cfg.micro_batch_rows or cfg.batch_rows

    def on_the_host(position: int) -> Iterator[tuple[Tensor, ...]]:
        while True:
            tokens, targets = row_batch(train, position, cfg.batch_rows, cfg.seq_len, cfg.seed)
            parts: list[Iterable[Tensor]] = [tokens.split(rows), targets.split(rows)]
            if ranked is not None:
                draws = [draw(ranked, t, cfg.shortlist, cfg.seed, position + i) for i, t in enumerate(parts[1])]
                parts[1:] = [[d[2] for d in draws], [d[0] for d in draws], [d[1] for d in draws]]
            yield tuple(torch.stack(tuple(part)) for part in parts)
            position += cfg.batch_rows

    for stacked in prefetch(on_the_host(position), device):
        yield list(zip(*stacked, strict=True)), cfg.batch_rows * cfg.seq_len


def candidates(cfg: PretrainConfig) -> int:
    """Tokens that the training softmax is over: the shortlist and a micro-batch's targets, or the whole vocabulary."""
    size = cfg.shortlist + (cfg.micro_batch_rows or cfg.batch_rows) * cfg.seq_len
    return min(size, cfg.model.vocab_size) if cfg.shortlist else cfg.model.vocab_size


def flops_per_token(cfg: PretrainConfig) -> float:
    return training_flops_per_token(dataclasses.replace(cfg.model, vocab_size=candidates(cfg)), cfg.seq_len)


def describe(
    say: Callable[..., None], cfg: PretrainConfig, run: Path, device: torch.device, n_train: int, n_validation: int, start: int
) -> None:
    """What is about to happen, in three lines."""
    tokens = cfg.steps * cfg.batch_rows * cfg.seq_len
    say(f"Model: {cfg.preset}, {count_parameters(cfg.model) / 1e6:.1f}M parameters on {device}, "
        f"{flops_per_token(cfg) / 1e9:.3f} GFLOP per token")  # fmt: skip
    say(f"Text:  {cfg.data}, {n_train:,} training and {n_validation:,} validation tokens")
    say(f"Run:   {run}, {cfg.steps} steps of {cfg.batch_rows} x {cfg.seq_len} = {tokens:,} tokens "
        f"({tokens / n_train:.2f} epochs), every slot real" + (f", from step {start}" if start else ""))  # fmt: skip
    if device.type == "cpu" and not cpu.available(torch.empty(0)):
        say(f"CPU kernels: {cpu.status()}")


def report(
    say: Callable[..., None], cfg: PretrainConfig, run: Path, model: Transformer, tokenizer: Tokenizer, train: Tokens | Mixture,
    held_out: Any, monitor: Monitor, seconds: float,
) -> None:  # fmt: skip
    """The end of a run: what it reached, beside what counting alone reaches, and what to do next."""
    baseline = unigram_perplexity(train[:MOST], held_out, tokenizer.vocab_size)
    prompt = torch.as_tensor(held_out[None, : min(32, cfg.seq_len // 2)].astype("int64"))
    sample = generate(model, prompt, 64, temperature=1.0, top_p=0.95, seed=cfg.seed)[0].tolist()
    say("")
    say(f"Training loss   {sparkline(monitor.losses)}")
    first = (
        f"{perplexity(monitor.validations[0]):.1f} before training, "
        if monitor.start == 0 and len(monitor.validations) > 1
        else ""
    )
    say(f"Validation perplexity {perplexity(monitor.validations[-1]):.2f} on {len(held_out):,} held-out tokens "
        f"({first}{baseline:.1f} by counting single tokens)")  # fmt: skip
    say(f"Time {seconds:.0f} s, peak memory {peak_gib(model.embedding.device):.1f} GiB")
    say("\nSample (the start of the held-out text, then the model's words):")
    say(tokenizer.decode(sample[: prompt.shape[1]]), style="dim", end="")
    say(tokenizer.decode(sample[prompt.shape[1] :]))
    say(f"\nCheckpoint: {checkpoint.locate(run)}\nNext:")
    for command, purpose in {
        f'fastlm generate {run} --prompt "def main("': "write with this model",
        f"fastlm pretrain --resume {run} --steps {2 * cfg.steps}": "train on",
        "fastlm pretrain --compile --data FILE.txt": "train on your own text",
        "fastlm doctor": "what runs on this machine, and why",
    }.items():
        say(f"  {command:58} {purpose}")

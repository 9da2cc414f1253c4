"""Pretraining: text in, language model out. The whole stage on one page."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm import checkpoint
from fastlm.bigram import MOST
from fastlm.commands import Sampling
from fastlm.config import PretrainConfig, check
from fastlm.data import IGNORED
from fastlm.data.prefetch import prefetch
from fastlm.data.text.batches import isolate_documents, row_batch, validation_batches
from fastlm.data.text.manifest import Settings
from fastlm.data.text.prepare import prepare
from fastlm.data.text.tokens import TokenSource, token_counts, unigram_perplexity
from fastlm.generate import generate
from fastlm.kernels import cpu
from fastlm.model import Transformer, build, compiled, count_parameters, pick_device, training_flops_per_token
from fastlm.monitor import Monitor, peak_gib, showing_bytes, sparkline
from fastlm.tokenizer import Tokenizer, load_tokenizer
from fastlm.train import distributed, loop
from fastlm.train.optim import make_optimizers
from fastlm.train.shortlist import by_frequency, draw


@distributed.over_processes
def pretrain(cfg: PretrainConfig) -> int:
    """Train a model as cfg says; returns the process's exit code (128 + signal number after an interruption)."""
    console = distributed.console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    device = pick_device(cfg.device)
    distributed.micro_rows(cfg)  # says so now if the processes cannot share the rows
    resumed = checkpoint.locate(cfg.resume) if cfg.resume else None
    run = Path(cfg.resume) if cfg.resume else loop.choose_run(cfg.out, f"pretrain-{Path(cfg.recipe).stem}")
    tokenizer = load_tokenizer(cfg.tokenizer)
    check(
        tokenizer.vocab_size <= cfg.model.vocab_size,
        f"tokenizer {cfg.tokenizer} has {tokenizer.vocab_size} tokens, but model.vocab_size is "
        f"{cfg.model.vocab_size}; pass --model.vocab-size {tokenizer.vocab_size}",
    )
    with showing_bytes(console) as progress:
        settings = Settings(on_bad_row=cfg.bad_rows)
        data = prepare(cfg.data, tokenizer, loop.cache_folder(cfg.cache), progress, settings)
    train, held_out = data.train, data.validation[: cfg.validation_tokens]
    train.rows(cfg.seq_len)  # says so now if the text is too short

    torch.manual_seed(cfg.seed)
    counted = cfg.init == "bigram" or (cfg.init == "auto" and not cfg.model.tie_embeddings)
    short = candidates(cfg) < cfg.model.vocab_size
    sample = torch.from_numpy(train[:MOST].astype("int64")) if short or counted else None
    start = sample if counted and resumed is None else None
    model = build(cfg.model, cfg.seed, device, start, checkpoint_activations=cfg.checkpoint_activations)
    model.attention_backend = loop.attention_backend(cfg, device)
    optimizers = make_optimizers(model, cfg.optim)
    state: dict[str, Any] = {
        "step": 0, "position": 0, "tokens": 0, "train_tokens": len(train), "validation_loss": None,
        "model": dataclasses.asdict(cfg.model), "tokenizer": tokenizer.name, "tokenizer_hash": tokenizer.hash,
    }  # fmt: skip
    if resumed is not None:
        state = loop.resume(resumed, model, optimizers, state, cfg.steps)
    loop.make_folder(run, cfg)
    describe(say, cfg, run, device, len(train), len(data.validation), state["step"])

    model_loss = compiled(model.loss, device) if cfg.compile else model.loss

    def loss(tokens: Tensor, targets: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
        with loop.autocast(device):
            return {"loss": model_loss(tokens, targets, cfg.z_loss, **options)}

    def plain_loss(tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with loop.autocast(device):
            return {"loss": model.loss(tokens, targets)}

    def validate() -> dict[str, float]:
        rows = validation_batches(held_out, cfg.seq_len, cfg.batch_rows // distributed.ranks()[1])
        return loop.with_perplexity(loop.validate(plain_loss, (((x, y), count(y)) for x, y in rows), device))

    ranked = by_frequency(sample, cfg.model.vocab_size) if short and sample is not None else None
    started = time.perf_counter()
    with Monitor(run, cfg.steps, state["step"], state["tokens"], flops_per_token(cfg), device, console,
                 cfg.tensorboard, distributed.ranks()) as monitor:  # fmt: skip
        steps = batches(cfg, train, state["position"], ranked, tokenizer.eos_id, device)
        stopped = loop.train(cfg, run, model, optimizers, state, steps, loss, validate, monitor)
    if stopped:
        name = signal.Signals(stopped).name
        say(f"Stopped by {name} after step {state['step']}; saved {checkpoint.locate(run)}. Go on with:")
        say(f"  fastlm pretrain --resume {run}")
        return 128 + stopped
    if distributed.first():
        report(say, cfg, run, model, tokenizer, train, held_out, monitor, time.perf_counter() - started)
    return 0


def batches(
    cfg: PretrainConfig, train: TokenSource, position: int, ranked: Tensor | None, eos_id: int, device: torch.device
) -> Iterator[loop.Step]:
    """Each step's micro-batches in this process, on the device, with what is counted in them."""
    rows = distributed.micro_rows(cfg)

    def on_the_host() -> Iterator[loop.Step]:
        for start in itertools.count(position, cfg.batch_rows):
            counted, parts = 0, []
            for i, first in distributed.mine(enumerate(range(start, start + cfg.batch_rows, rows))):
                x, y = row_batch(train, first, rows, cfg.seq_len, cfg.seed)
                options: dict[str, Any] = {}
                if cfg.isolate_documents:
                    y, positions, cu_seqlens, longest = isolate_documents(x, y, eos_id)
                    options |= {"positions": positions, "cu_seqlens": cu_seqlens, "max_seqlen": longest}
                counted += count(y)
                if ranked is not None:
                    options["shortlist"], options["raised"], y = draw(ranked, y, cfg.shortlist, cfg.seed, start + i)
                parts.append((x, y, options))
            figures: dict[str, Any] = {"tokens": len(parts) * rows * cfg.seq_len}
            drawn = train.tokens_drawn(start + cfg.batch_rows, cfg.seq_len)
            if len(drawn) > 1:
                figures["tokens_by_source"] = drawn
            yield parts, counted, figures

    return prefetch(on_the_host(), device)


def count(targets: Tensor) -> int:
    return int((targets != IGNORED).sum())


def candidates(cfg: PretrainConfig) -> int:
    """Tokens that the training softmax is over: the shortlist and a micro-batch's targets, or the whole vocabulary."""
    size = cfg.shortlist + distributed.micro_rows(cfg) * cfg.seq_len
    return min(size, cfg.model.vocab_size) if cfg.shortlist else cfg.model.vocab_size


def flops_per_token(cfg: PretrainConfig) -> float:
    return training_flops_per_token(dataclasses.replace(cfg.model, vocab_size=candidates(cfg)), cfg.seq_len)


def describe(
    say: Callable[..., None], cfg: PretrainConfig, run: Path, device: torch.device, n_train: int, n_validation: int, start: int
) -> None:
    """What is about to happen, in three lines."""
    tokens = cfg.steps * cfg.batch_rows * cfg.seq_len
    say(f"Model: {cfg.preset}, {count_parameters(cfg.model) / 1e6:.1f}M parameters on {distributed.devices(device)}, "
        f"{flops_per_token(cfg) / 1e9:.3f} GFLOP per token")  # fmt: skip
    say(f"Text:  {cfg.data}, {n_train:,} training and {n_validation:,} validation tokens")
    say(f"Run:   {run}, {cfg.steps} steps of {cfg.batch_rows} x {cfg.seq_len} = {tokens:,} tokens "
        f"({tokens / n_train:.2f} epochs), every slot real" + (f", from step {start}" if start else ""))  # fmt: skip
    if device.type == "cpu" and not cpu.available(torch.empty(0)):
        say(f"CPU kernels: {cpu.status()}")


def report(
    say: Callable[..., None], cfg: PretrainConfig, run: Path, model: Transformer, tokenizer: Tokenizer, train: TokenSource,
    held_out: Any, monitor: Monitor, seconds: float,
) -> None:  # fmt: skip
    """The end of a run: what it reached, beside what counting alone reaches, and what to do next."""
    counts = (token_counts(ids, tokenizer.vocab_size) for ids in (train[:MOST], held_out))
    baseline = unigram_perplexity(*counts)
    prompt = held_out[: min(32, cfg.seq_len // 2)].tolist()
    sample = generate(model, [prompt], 64, Sampling(temperature=1.0, top_p=0.95), cfg.seed)[0]
    say("")
    say(f"Training loss   {sparkline(monitor.losses)}")
    first = (
        f"{monitor.validations[0]['perplexity']:.1f} before training, "
        if monitor.start == 0 and len(monitor.validations) > 1
        else ""
    )
    say(f"Validation perplexity {monitor.validations[-1]['perplexity']:.2f} on {len(held_out):,} held-out tokens "
        f"({first}{baseline:.1f} by counting single tokens)")  # fmt: skip
    say(f"Time {seconds:.0f} s, peak memory {peak_gib(model.embedding.device):.1f} GiB")
    say("\nSample (the start of the held-out text, then the model's words):")
    say(tokenizer.decode(prompt), style="dim", end="")
    say(tokenizer.decode(sample))
    say(f"\nCheckpoint: {checkpoint.locate(run)}\nNext:")
    for command, purpose in {
        f'fastlm generate {run} --prompt "def main("': "write with this model",
        f"fastlm pretrain --resume {run} --steps {2 * cfg.steps}": "train on",
        "fastlm pretrain --compile --data FILE.txt": "train on your own text",
        "fastlm doctor": "what runs on this machine, and why",
    }.items():
        say(f"  {command:58} {purpose}")

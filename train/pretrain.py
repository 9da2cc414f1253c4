"""Pretraining: text in, language model out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.config import PretrainConfig, Sampling
from fastlm.data import IGNORED
from fastlm.data.text.batches import isolate_documents, row_batch, validation_batches
from fastlm.data.text.manifest import Settings
from fastlm.data.text.prepare import prepare
from fastlm.data.text.tokens import TokenData, TokenSource, token_counts, unigram_perplexity
from fastlm.errors import check
from fastlm.inference.generation import generate
from fastlm.kernels import native
from fastlm.model import build, count_parameters
from fastlm.monitor import Monitor, showing_bytes
from fastlm.runtime import autocast
from fastlm.tokenizer import Tokenizer, load_tokenizer
from fastlm.train import loop, parallel
from fastlm.train.run import (
    cache_folder,
    check_start,
    choose_attention,
    compiled_step,
    finish,
    resume_or_create,
    say_start,
    settle_memory,
    train_steps,
)
from fastlm.train.token_statistics import COUNTED, TrainingSoftmax, initialiser


@parallel.under_torchrun
def pretrain(cfg: PretrainConfig) -> int:
    """Train a model as cfg says; returns the process's exit code."""
    device = check_start(cfg)
    tokenizer = open_tokenizer(cfg)
    data = open_text(cfg, tokenizer)
    held_out = data.validation[: cfg.validation_tokens]

    softmax = TrainingSoftmax(cfg, data.train, parallel.micro_rows(cfg))
    model = build(
        cfg.model,
        cfg.seed,
        device,
        initialiser(cfg, data.train),
        checkpoint_activations=cfg.checkpoint_activations,
    )
    parallel.distribute(cfg, model, device)
    attention = choose_attention(cfg, device, cfg.model, packed=cfg.isolate_documents)
    model.attention_backend = attention.backend
    settle_memory(model, device, parallel.micro_rows(cfg) * cfg.seq_len)
    say_model_and_text(cfg, device, data, softmax.flops_per_token())
    name = f"pretrain-{Path(cfg.recipe).stem}"
    facts = {"train_tokens": len(data.train), "attention": str(attention)}
    run = resume_or_create("pretrain", cfg, device, model, tokenizer, facts, name)
    say_start(run, described(cfg, len(data.train)))

    training_loss = compiled_step(cfg, device, model, softmax.loss(model))

    def loss(tokens: Tensor, targets: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
        with autocast(device):
            return {"loss": training_loss(tokens, targets, cfg.z_loss, **options)}

    def plain_loss(tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with autocast(device):
            return {"loss": model.loss(tokens, targets)}

    def validate() -> dict[str, float]:
        rows = cfg.batch_rows // parallel.ranks()[1]
        windows = validation_batches(held_out, cfg.seq_len, rows)
        counted = (((x, y), count(y)) for x, y in windows)
        return loop.with_perplexity(loop.validate(plain_loss, counted, device))

    position = run.state["position"]
    steps = softmax.steps(batches(cfg, data.train, position, tokenizer.eos_id), position)
    outcome = train_steps(run, steps, loss, validate, softmax.flops_per_token())

    def result() -> None:
        texts = (data.train[:COUNTED], held_out)
        counts = (token_counts(ids, tokenizer.vocab_size) for ids in texts)
        baseline = unigram_perplexity(*counts)
        say_result(run, outcome.monitor, len(held_out), baseline)
        say_sample(run, held_out[: min(32, cfg.seq_len // 2)].tolist())

    next_commands = {
        f'fastlm generate {run.folder} --prompt "def main("': "write with this model",
        f"fastlm pretrain --resume {run.folder} --steps {2 * cfg.steps}": "train on",
        "fastlm pretrain --compile --data FILE.txt": "train on your own text",
        "fastlm doctor": "what runs on this machine, and why",
    }
    return finish(run, outcome, result, next_commands)


def open_tokenizer(cfg: PretrainConfig) -> Tokenizer:
    """The tokenizer; UserError where the model's vocabulary is too small for it."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    check(
        tokenizer.vocab_size <= cfg.model.vocab_size,
        f"tokenizer {cfg.tokenizer} has {tokenizer.vocab_size} tokens, but model.vocab_size is "
        f"{cfg.model.vocab_size}; pass --model.vocab-size {tokenizer.vocab_size}",
    )
    return tokenizer


def open_text(cfg: PretrainConfig, tokenizer: Tokenizer) -> TokenData:
    """The tokenised text, prepared where it is not there yet.

    Raises UserError where the training text is too short for a row.
    """
    with parallel.main_process_first(), showing_bytes(parallel.console()) as progress:
        settings = Settings(on_bad_row=cfg.bad_rows)
        data = prepare(cfg.data, tokenizer, cache_folder(cfg.cache), progress, settings)
    data.train.rows(cfg.seq_len)  # raises where there is not one
    return data


def batches(
    cfg: PretrainConfig,
    train: TokenSource,
    position: int,
    eos_id: int,
) -> Iterator[loop.Step]:
    """Each step's micro-batches in this process, with what is counted in them.

    position: rows that the run has drawn before.
    """
    rows = parallel.micro_rows(cfg)
    most_documents = 0  # of a micro-batch: one shape for all, so that nothing compiles twice
    if cfg.isolate_documents:
        all_rows = range(position, position + cfg.steps * cfg.batch_rows, rows)
        most_documents = train.most_documents(all_rows, cfg.seq_len, cfg.seed)
    for start in itertools.count(position, cfg.batch_rows):
        counted = 0
        micro_batches = []
        starts = range(start, start + cfg.batch_rows, rows)
        for first in parallel.shard(starts):
            x, y = row_batch(train, first, rows, cfg.seq_len, cfg.seed)
            options: dict[str, Any] = {}
            if cfg.isolate_documents:
                y, positions, cu_seqlens, longest = isolate_documents(x, y, eos_id, most_documents)
                options["positions"] = positions
                options["cu_seqlens"] = cu_seqlens
                options["max_seqlen"] = longest
            counted += count(y)
            micro_batches.append((x, y, options))
        figures: dict[str, Any] = {"tokens": len(micro_batches) * rows * cfg.seq_len}
        drawn = train.tokens_drawn(start + cfg.batch_rows, cfg.seq_len)
        if len(drawn) > 1:
            figures["tokens_by_source"] = drawn
        yield micro_batches, counted, figures


def count(targets: Tensor) -> int:
    """How many of the targets the loss counts."""
    return int((targets != IGNORED).sum())


def say_model_and_text(
    cfg: PretrainConfig, device: torch.device, data: TokenData, flops_per_token: float
) -> None:
    """The first words: what is trained on what."""
    lines = [
        f"Model: {cfg.preset}, {count_parameters(cfg.model) / 1e6:.1f}M parameters on "
        f"{parallel.devices(device)}, {flops_per_token / 1e9:.3f} GFLOP per token",
        f"Text:  {cfg.data}, {len(data.train):,} training and {len(data.validation):,} validation "
        "tokens",
    ]
    if device.type == "cpu" and not native.available(torch.empty(0)):
        lines.append(f"CPU kernels: {native.status()}")
    for line in lines:
        parallel.console().print(line, highlight=False, markup=False, soft_wrap=True)


def described(cfg: PretrainConfig, n_train: int) -> str:
    """How long the run is, in words."""
    tokens = cfg.steps * cfg.batch_rows * cfg.seq_len
    return (
        f"{cfg.steps} steps of {cfg.batch_rows} x {cfg.seq_len} = {tokens:,} tokens "
        f"({tokens / n_train:.2f} epochs), every slot real"
    )


def say_result(run: loop.Run, monitor: Monitor, n_held_out: int, baseline: float) -> None:
    """What the run reached, beside the start and what counting single tokens reaches."""
    before = ""
    if monitor.start == 0 and len(monitor.validations) > 1:
        before = f"{monitor.validations[0]['perplexity']:.1f} before training, "
    run.say(
        f"Validation perplexity {monitor.validations[-1]['perplexity']:.2f} on {n_held_out:,} "
        f"held-out tokens ({before}{baseline:.1f} by counting single tokens)"
    )


def say_sample(run: loop.Run, prompt: list[int]) -> None:
    """What the model writes after the prompt."""
    sampling = Sampling(temperature=1.0, top_p=0.95)
    sample = generate(run.model, [prompt], 64, sampling, run.cfg.seed)[0]
    run.say("\nSample (the start of the held-out text, then the model's words):")
    run.say(run.tokenizer.decode(prompt), style="dim", end="")
    run.say(run.tokenizer.decode(sample))

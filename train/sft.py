"""Supervised fine-tuning: instructions and responses in, a model that answers and stops out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastlm.config import Sampling, SftConfig
from fastlm.data.examples.load import load_instructions
from fastlm.data.examples.packing import PackedBatch
from fastlm.inference.generation import generate
from fastlm.monitor import Monitor
from fastlm.runtime import autocast
from fastlm.train import loop, parallel
from fastlm.train.packed import Tuning, open_tuning
from fastlm.train.run import compiled_step, finish, resume_or_create, say_start, train_steps

SAMPLES = 8
SAMPLE_TOKENS = 128


@parallel.under_torchrun
def sft(cfg: SftConfig) -> int:
    """Train a model on responses as cfg says; returns the process's exit code.

    The loss of a step is the sum of -log p over the counted targets of all its rows, responses and
    their end-of-text, by their number: nats per token, whatever the packing and the micro-batches.
    """
    tuning = open_tuning(cfg, load_instructions)
    cfg, device, model = tuning.cfg, tuning.device, tuning.model
    name = f"sft-{Path(cfg.model).name}"
    run = resume_or_create("sft", cfg, device, model, tuning.tokenizer, tuning.facts, name)
    say_start(run, tuning.described())
    training_loss = compiled_step(cfg, device, model, model.loss)

    def loss(batch: PackedBatch) -> dict[str, Tensor]:
        # validation compiles nothing more
        function = training_loss if torch.is_grad_enabled() else model.loss
        with autocast(device):
            total = function(batch.x, batch.y, max_counted=tuning.max_counted, **batch.layout())
        return {"loss": total}

    def validate() -> dict[str, float]:
        held_out = (((batch,), batch.counted) for batch in tuning.held_out_batches())
        return loop.with_perplexity(loop.validate(loss, held_out, device))

    steps = batches(tuning, run.state["position"])
    outcome = train_steps(run, steps, loss, validate, tuning.flops_per_token())

    def result() -> None:
        say_result(run, outcome.monitor)
        if tuning.held_out is not None:
            say_answers(run, tuning)

    next_commands = {
        f"fastlm chat {run.folder}": "talk to this model",
        f"fastlm dpo {run.folder} --data FILE.jsonl": "teach it which answers are preferred",
    }
    return finish(run, outcome, result, next_commands)


def batches(tuning: Tuning, position: int) -> Iterator[loop.Step]:
    """Each step's micro-batches in this process and their counted targets."""
    for micro_batches in tuning.steps(position):
        real = sum(batch.real for batch in micro_batches)
        slots = sum(batch.x.numel() for batch in micro_batches)
        counted = sum(batch.counted for batch in micro_batches)
        figures = {"tokens": real, "real_share": real / slots}
        yield [(batch,) for batch in micro_batches], counted, figures


def say_result(run: loop.Run, monitor: Monitor) -> None:
    """What the held-out responses are worth now, and what they were."""
    if not monitor.validations:
        return
    first, last = monitor.validations[0], monitor.validations[-1]
    run.say(
        f"Held-out responses: {last['loss']:.4f} nats a token, perplexity "
        f"{last['perplexity']:.2f} ({first['perplexity']:.2f} at the first validation)"
    )


def say_answers(run: loop.Run, tuning: Tuning) -> None:
    """Answers to held-out prompts: how many end by themselves, and one of them."""
    assert tuning.held_out is not None
    prompts = []
    for number in range(min(SAMPLES, len(tuning.held_out.ends))):
        ids, counted = tuning.held_out.sequence(number)
        prompts.append(ids[: int(counted.argmax())].tolist())
    stop = {run.tokenizer.eos_id}
    answers = generate(run.model.eval(), prompts, SAMPLE_TOKENS, Sampling(temperature=0), stop=stop)
    ended = sum(len(answer) < SAMPLE_TOKENS for answer in answers)
    run.say(
        f"{ended} of {len(prompts)} greedy answers end by themselves within {SAMPLE_TOKENS} tokens"
    )
    run.say("\nSample (a held-out prompt, then the model's answer):")
    run.say(run.tokenizer.decode(prompts[0]), style="dim", end="")
    run.say(run.tokenizer.decode(answers[0]))

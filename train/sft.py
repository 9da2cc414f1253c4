"""Supervised fine-tuning: instructions and responses in, a model that answers and stops out. The whole stage on one page."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fastlm.commands import Sampling
from fastlm.config import SftConfig
from fastlm.data.examples import load_instructions
from fastlm.data.packing import PackedBatch
from fastlm.generate import generate
from fastlm.runtime import autocast
from fastlm.train import distributed, loop, tuning

SAMPLES, SAMPLE_TOKENS = 8, 128


@distributed.over_processes
def sft(cfg: SftConfig) -> int:
    """Train a model on responses as cfg says; returns the process's exit code (128 + signal number after an interruption).

    The loss of a step is the sum of -log p over the counted targets of all its rows, responses and their end-of-text, by
    their number: nats per token, whatever the packing and the micro-batches.
    """
    run = tuning.begin("sft", cfg, load_instructions)
    tuning.go_on(run)
    model_loss = loop.compiled_step(run.cfg, run.model, run.model.loss, run.device, run.say)

    def loss(batch: PackedBatch) -> dict[str, Tensor]:
        with autocast(run.device):
            function = model_loss if torch.is_grad_enabled() else run.model.loss  # validation compiles nothing more
            return {"loss": function(batch.x, batch.y, max_counted=run.max_counted, **batch.layout())}

    def validate() -> dict[str, float]:
        held_out = (((batch,), batch.counted) for batch in run.held_out_batches())
        return loop.with_perplexity(loop.validate(loss, held_out, run.device))

    started = time.perf_counter()
    stopped, monitor = tuning.train(run, batches(run), loss, validate)

    def result() -> None:
        if monitor.validations:
            first, last = monitor.validations[0], monitor.validations[-1]
            run.say(f"Held-out responses: {last['loss']:.4f} nats a token, perplexity {last['perplexity']:.2f} "
                    f"({first['perplexity']:.2f} at the first validation)")  # fmt: skip
            answer(run)

    return tuning.end(run, "sft", stopped, monitor, time.perf_counter() - started, result)


def batches(run: tuning.Run) -> Iterator[loop.Step]:
    """Each step's micro-batches in this process and their counted targets."""
    for parts in run.layouts(run.state["position"]):
        real = sum(part.real for part in parts)
        figures = {"tokens": real, "real_share": real / sum(part.x.numel() for part in parts)}
        yield [(part,) for part in parts], sum(part.counted for part in parts), figures


def answer(run: tuning.Run) -> None:
    """Answers to held-out prompts: how many end by themselves, and one of them."""
    assert run.held_out is not None
    prompts = []
    for number in range(min(SAMPLES, len(run.held_out.ends))):
        ids, counted = run.held_out.sequence(number)
        prompts.append(ids[: int(counted.argmax())].tolist())
    answers = generate(run.model.eval(), prompts, SAMPLE_TOKENS, Sampling(temperature=0), stop={run.tokenizer.eos_id})
    ended = sum(len(a) < SAMPLE_TOKENS for a in answers)
    run.say(f"{ended} of {len(prompts)} greedy answers end by themselves within {SAMPLE_TOKENS} tokens")
    run.say("\nSample (a held-out prompt, then the model's answer):")
    run.say(run.tokenizer.decode(prompts[0]), style="dim", end="")
    run.say(run.tokenizer.decode(answers[0]))

"""What comes after pretraining, on a GPU, with modern-253m: SFT, DPO, evaluation and writing.

SFT and DPO are fastlm's own stages (bench/harness/gpu_stage.py) on the standard library's
functions, packed into rows: 32 of 1,024 tokens, and 16 of 2,048. Evaluation is the perplexity of
windows of 1,024 tokens, writing is greedy, both in fp32 as their commands do. Each contender has a
process of its own. transformers is measured where it is installed; TRL is measured on the CPU alone
(bench/test_alignment.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from bench.counted.compiled_step import plain_operations
from bench.harness.gpu_stage import (
    CACHE,
    Seen,
    Size,
    on_this_machine,
    run_folder,
    size,
    starting_model,
    watch,
)
from bench.harness.gpu_timing import Call, device, in_turns, on_gpu, rehearsing
from bench.peers.gpu import absent
from fastlm import kernels
from fastlm.config import DpoConfig, Sampling, SftConfig
from fastlm.evaluation.protocols import window_segments
from fastlm.evaluation.score import segment_nats
from fastlm.inference.generation import generate
from fastlm.model import Transformer, build, training_flops_per_token
from fastlm.train.dpo import dpo
from fastlm.train.sft import sft

SCORED = {True: 1 << 18, False: 64}  # tokens; measured or rehearsed
WRITTEN = {True: 128, False: 3}
PROMPT = {True: 64, False: 4}
ABSENT = absent("transformers", "transformers")
if not ABSENT and on_gpu() and rehearsing():
    # it masks and ends by values that it reads from the GPU
    ABSENT = "transformers decides by values on the GPU, and the stand-in computes none"


# ---------------------------------------------------------------- SFT and DPO


def tune(stage: str, s: Size) -> Seen:
    length = min(512, s.seq_len)
    options: dict[str, Any] = {
        "data": s.examples,
        "cache": str(CACHE),
        "compile": True,
        "steps": s.steps,
        "max_len": length,
        "held_out": 0.0,
        "validate_every": 0,
        "checkpoint_every": 0,
    }
    with run_folder() as run:
        options["model"] = str(starting_model(s, run.with_name("start")))
        options["out"] = str(run)
        if stage == "sft":
            cfg = SftConfig(**options, batch_rows=s.rows, row_len=s.seq_len)
            return watch(sft, cfg, s, s.few_steps)
        rows = max(1, s.rows * s.seq_len // (4 * length))
        options["steps"] = s.few_steps + 1  # the reference scores the rows of these steps
        return watch(dpo, DpoConfig(**options, batch_rows=rows, row_len=4 * length), s, s.few_steps)


def plain(stage: str, s: Size) -> Seen:
    with mock.patch.multiple(kernels, **plain_operations()):
        return tune(stage, s)


TUNERS = {"ours": tune, "plain PyTorch compiled": plain}


@pytest.mark.parametrize("contender", TUNERS)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_gpu_tuning(stage, contender, measuring, record, kernels_on_device):
    if contender == "ours":
        record(peer="TRL", missing="measured on the CPU alone: pytest bench/test_alignment.py")
    s = size(measuring)
    seen = TUNERS[contender](stage, s)
    figures = seen.figures(training_flops_per_token(s.model, s.seq_len))
    figures.pop("mfu", None)  # few of the targets are counted, and the documents are short
    values = {contender: seen.milliseconds}
    record(values, "ms", measures={contender: figures}, fields=seen.fields(s))


# ---------------------------------------------------------------- evaluation and writing


def real(measuring: bool) -> bool:
    return measuring and not rehearsing()


def our_model(s: Size) -> Transformer:
    return build(s.model, 0, device()).eval()


def their_model(s: Size) -> torch.nn.Module:
    from bench.peers.llama import llama

    return llama(s.model).eval()


def random_ids(s: Size, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(s.model.vocab_size, (rows, length), generator=generator)


def our_score(s: Size, tokens: int, compiled: bool = False) -> Call:
    scored = our_model(s)
    segments = window_segments(random_ids(s, 1, tokens)[0].tolist(), s.seq_len, s.seq_len)
    return lambda: segment_nats(scored, segments, device(), compile=compiled)


def their_score(s: Size, tokens: int) -> Call:
    """The plain loop, eight windows at a time: all logits, their cross-entropy."""
    scored = their_model(s)
    windows = random_ids(s, tokens // s.seq_len, s.seq_len).to(device())

    @torch.no_grad()
    def turn() -> float:
        total = torch.zeros((), device=device())
        for batch in windows.split(8):
            logits = scored(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            total += F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        return total.item()

    return turn


SCORERS: dict[str, Callable[[Size, int], Call]] = {
    "ours": our_score,
    "ours compiled": partial(our_score, compiled=True),
    **({} if ABSENT else {"transformers": their_score}),
}


@pytest.mark.parametrize("contender", SCORERS)
def test_gpu_evaluation(contender, measuring, record, kernels_on_device):
    if contender == "ours" and ABSENT:
        record(peer="transformers", missing=ABSENT)
    s = size(measuring)
    tokens = SCORED[real(measuring)]
    with on_this_machine(s):
        turn = SCORERS[contender](s, tokens)
        turn()
        times = in_turns({contender: turn}, 3)
    rate = 1e3 * tokens / statistics.median(times[contender])
    record(times, "ms", measures={contender: {"tokens_per_second": rate}}, fields={"shape": s.case})


def our_writer(s: Size, prompts: torch.Tensor, tokens: int) -> Call:
    writer = our_model(s)
    return lambda: generate(writer, prompts.tolist(), tokens, Sampling(temperature=0))


def their_writer(s: Size, prompts: torch.Tensor, tokens: int) -> Call:
    writer = their_model(s)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    ids = prompts.to(device())
    return lambda: writer.generate(ids, attention_mask=torch.ones_like(ids), **options)


WRITERS = {"ours": our_writer, **({} if ABSENT else {"transformers": their_writer})}


@pytest.mark.parametrize("contender", WRITERS)
def test_gpu_writing(contender, measuring, record, kernels_on_device):
    if contender == "ours" and ABSENT:
        record(peer="transformers", missing=ABSENT)
    s = size(measuring)
    tokens = WRITTEN[real(measuring)]
    for prompts in (1, 8, 64) if real(measuring) else (1, 2):
        with on_this_machine(s):
            turn = WRITERS[contender](s, random_ids(s, prompts, PROMPT[real(measuring)]), tokens)
            turn()
            times = in_turns({contender: turn}, 3)
        rate = 1e3 * prompts * tokens / statistics.median(times[contender])
        case = f"{prompts} prompts, {tokens} tokens each"
        figures = {contender: {"tokens_per_second": rate}}
        record(times, "ms", case=case, measures=figures, fields={"shape": s.case})

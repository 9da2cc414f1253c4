"""What the counts of a text's tokens give a small model: first weights, and a softmax over few.

Pretraining asks for both here; the model knows of neither, and without them nothing is counted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlm.config import PretrainConfig
from fastlm.data.text.tokens import TokenSource
from fastlm.model import Initialiser, Transformer, initialise, training_flops_per_token
from fastlm.runtime import ranks
from fastlm.train.loop import Step
from fastlm.train.token_statistics.bigram import initialise_from_bigrams
from fastlm.train.token_statistics.shortlist import by_frequency, draw, loss_over

COUNTED = 20_000_000  # tokens: more do not change the statistics of the frequent ones


def sample(text: TokenSource) -> Tensor:
    """The beginning of a text, (n,) int64."""
    return torch.from_numpy(text[:COUNTED].astype("int64"))


def initialiser(cfg: PretrainConfig, text: TokenSource) -> Initialiser:
    """What fills a new model's parameters: initialise(), or the text's bigrams as cfg.init says."""
    wanted = cfg.init == "bigram" or (cfg.init == "auto" and not cfg.model.tie_embeddings)
    if not wanted or cfg.resume:  # a resumed run has its parameters
        return initialise
    return partial(initialise_from_bigrams, text=sample(text))


class TrainingSoftmax:
    """The softmax that a run trains: over the vocabulary, or over cfg.shortlist and its targets.

    Validation always uses the whole vocabulary.
    """

    def __init__(self, cfg: PretrainConfig, text: TokenSource, micro_rows: int):
        """micro_rows: of one forward and backward pass."""
        self.cfg = cfg
        self.size = cfg.model.vocab_size
        self.ranked: Tensor | None = None
        candidates = cfg.shortlist + micro_rows * cfg.seq_len
        if cfg.shortlist and candidates < self.size:
            self.size = candidates
            self.ranked = by_frequency(sample(text), cfg.model.vocab_size)

    def flops_per_token(self) -> float:
        shape = dataclasses.replace(self.cfg.model, vocab_size=self.size)
        return training_flops_per_token(shape, self.cfg.seq_len)

    def loss(self, model: Transformer) -> Callable[..., Tensor]:
        """The loss of the micro-batches of steps()."""
        if self.ranked is None:
            return model.loss

        def loss(*batch: Any, **options: Any) -> Tensor:
            return model.run(loss_over, *batch, **options)

        return loss

    def steps(self, steps: Iterator[Step], position: int) -> Iterator[Step]:
        """The steps, with candidates drawn for each micro-batch.

        position: rows that the run has drawn before the first of them.
        """
        if self.ranked is None:
            yield from steps
            return
        rank, world = ranks()
        starts = itertools.count(position, self.cfg.batch_rows)
        for start, (micro_batches, counted, figures) in zip(starts, steps, strict=False):
            drawn = []
            numbers = itertools.count(start + rank, world)
            for number, (x, y, options) in zip(numbers, micro_batches, strict=False):
                found = draw(self.ranked, y, self.cfg.shortlist, self.cfg.seed, number)
                candidates = {"shortlist": found.ids, "logit_offsets": found.logit_offsets}
                drawn.append((x, found.targets, options | candidates))
            yield drawn, counted, figures

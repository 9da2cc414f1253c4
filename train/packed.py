"""What SFT and DPO train on: examples packed into rows, as steps of micro-batches."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch

from fastlm.config import TuningConfig
from fastlm.data.examples.load import Examples, pack_examples
from fastlm.data.examples.packing import PackedBatch, PackedRows, packed_batch, packed_epoch
from fastlm.errors import check
from fastlm.interop.open_model import open_model
from fastlm.model import Transformer, count_parameters, training_flops_per_token
from fastlm.model.old_names import old_names
from fastlm.tokenizer import Tokenizer
from fastlm.train import parallel
from fastlm.train.run import cache_folder, check_start, choose_attention, settle_memory

MAX_LEN = 512  # of an example, where the options do not say

C = TypeVar("C", bound=TuningConfig)


@dataclass(frozen=True)
class Tuning(Generic[C]):
    """A model to tune, and the rows to tune it on; cfg has its lengths and number of steps settled.

    notes: what is worth noting in the run's state, such as the template of the examples.
    """

    cfg: C
    device: torch.device
    model: Transformer
    tokenizer: Tokenizer
    train: PackedRows
    held_out: PackedRows | None
    notes: dict[str, Any]

    @property
    def micro_rows(self) -> int:
        """Rows of one pass in this process."""
        return parallel.micro_rows(self.cfg)

    @property
    def max_counted(self) -> int:
        """Targets that a micro-batch may have."""
        most = self.train.most_counted
        if self.held_out is not None:
            most = max(most, self.held_out.most_counted)
        return self.micro_rows * most

    @cached_property
    def room(self) -> tuple[int, int]:
        """Segments and keys that a micro-batch may have: one size, so nothing compiles twice."""
        sizes = [self.train.room(self.micro_rows)]
        if self.held_out is not None:
            sizes.append(self.held_out.room(self.micro_rows))
        segments, keys = zip(*sizes, strict=True)
        return max(segments), max(keys)

    @property
    def facts(self) -> dict[str, Any]:
        """What the run starts from, for its state."""
        return {
            "train_tokens": self.train.real_slots,
            "start": self.cfg.model,
            "start_hash": model_hash(self.model),
            **self.notes,
        }

    def steps(self, position: int) -> Iterator[list[PackedBatch]]:
        """This process's micro-batches of each step, from the row `position` on."""
        for start in itertools.count(position, self.cfg.batch_rows):
            first_rows = range(start, start + self.cfg.batch_rows, self.micro_rows)
            yield [
                packed_batch(self.train, row, self.micro_rows, self.cfg.seed, self.room)
                for row in parallel.shard(first_rows)
            ]

    def held_out_batches(self) -> Iterator[PackedBatch]:
        """Every held-out row once."""
        if self.held_out is None:
            return iter(())
        return packed_epoch(self.held_out, self.micro_rows, self.room)

    def flops_per_token(self) -> float:
        """Of a real token, on average: the head is multiplied for counted targets only."""
        share = float(self.train.counted.sum()) / max(1, self.train.real_slots)
        columns = max(1, round(self.model.config.vocab_size * share))
        shape = dataclasses.replace(self.model.config, vocab_size=columns)
        length = round(self.train.real_slots / max(1, len(self.train.ends)))
        return training_flops_per_token(shape, length)

    def described(self) -> str:
        """How long the run is, in words."""
        epochs = self.cfg.steps * self.cfg.batch_rows / len(self.train)
        return f"{self.cfg.steps} steps of {self.cfg.batch_rows} rows ({epochs:.2f} epochs)"


def open_tuning(
    cfg: C, load: Callable[..., Examples], group: int = 1, share: bool = False
) -> Tuning[C]:
    """Open the model and the examples, pack them, settle the steps, and say so.

    load: reads the examples. group: sequences that belong together, two in a pair of answers.
    share: whether a pair's prompt is computed once for both.
    """
    device = check_start(cfg)
    model, tokenizer = open_model(cfg.model, device, cfg.tokenizer)
    parallel.distribute(cfg, model, device)
    cfg = with_lengths(cfg, model.config.max_seq_len, group)
    examples = read_examples(cfg, tokenizer, load)
    train, held_out = pack_examples(examples, cfg.row_len, group, share)
    steps = cfg.steps or math.ceil(cfg.epochs * len(train) / cfg.batch_rows)
    cfg = dataclasses.replace(cfg, steps=steps)

    model.train()
    model.checkpoint_activations = cfg.checkpoint_activations
    attention = choose_attention(cfg, device, model.config, packed=True)
    model.attention_backend = attention.backend
    settle_memory(model, device, parallel.micro_rows(cfg) * train.row_len)
    what = "pairs" if group > 1 else "examples"
    for line in (
        f"Model: {cfg.model}, {count_parameters(model.config) / 1e6:.1f}M parameters on "
        f"{parallel.devices(device)}",
        f"Data:  {examples.report.line()}",
        f"Rows:  {len(examples.train) // group:,} training {what} in {len(train):,} rows of "
        f"{train.row_len}, {train.real_share:.1%} of the slots real; "
        f"{len(examples.validation) // group:,} held out",
    ):
        parallel.console().print(line, highlight=False, markup=False, soft_wrap=True)
    notes = {"attention": str(attention), "template": examples.report.template}
    return Tuning(cfg, device, model, tokenizer, train, held_out, notes)


def read_examples(
    cfg: TuningConfig, tokenizer: Tokenizer, load: Callable[..., Examples]
) -> Examples:
    """The examples of a stage.

    One process of each machine reads them, the others what it has put into the cache.
    """
    with parallel.main_process_first():
        return load(
            cfg.data,
            tokenizer,
            cfg.max_len,
            cfg.template,
            cfg.bad_rows,
            cfg.held_out,
            cache_folder(cfg.cache),
        )


def with_lengths(cfg: C, longest: int, group: int) -> C:
    """The options with max_len and row_len settled for a model whose texts end at `longest`."""
    check(
        cfg.max_len <= longest,
        f"max_len is {cfg.max_len}, but the model's texts end at {longest}; "
        f"pass --max-len {longest}",
    )
    max_len = cfg.max_len or min(longest, MAX_LEN)
    row_len = cfg.row_len or max_len * (4 if group > 1 else 1)
    return dataclasses.replace(cfg, max_len=max_len, row_len=row_len)


def model_hash(model: Transformer) -> str:
    """SHA-256 of the parameters, 16 hex digits; under their old names, which older runs noted."""
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    for old, name in old_names(parameters).items():
        p = parameters[name]
        digest.update(old.encode())
        digest.update(parallel.whole(p.detach()).cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]

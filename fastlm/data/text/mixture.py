"""Several sources in stated proportions, and documents in a seeded order; neither needs more state than the position.

A mixture "a:4, b:0.25" is four epochs of a and a quarter of b, w_i = epochs_i * rows_i rows of each. The first n rows of the
run hold c_i(n) of source i: c_1(n) = round(n w_1 / W), the rest shared among the others the same way, so every prefix has
the stated proportions to within half a row per source, and which source row n comes from follows from n alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlm.data.order import mix64, rows_per_epoch
from fastlm.data.text.tokens import Tokens, token_counts
from fastlm.errors import UserError

_PART = re.compile(r"(?P<source>.+?)(?::(?P<epochs>\d+(?:\.\d+)?|\.\d+))?$")


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Sources and epochs of "wikitext-103:4, tinystories:0.25" (1 where no number is given); UserError where one is wrong."""
    parts = []
    for part in text.split(","):
        match = _PART.match(part.strip())
        if match is None:
            raise UserError(f'mixture {text!r}: an empty part; expected "source:epochs, source:epochs"')
        epochs = float(match["epochs"] or 1)
        if epochs <= 0:
            raise UserError(f"mixture {text!r}: {match['source']} has {epochs:g} epochs; expected more than 0")
        parts.append((match["source"].strip(), epochs))
    if len({source for source, _ in parts}) < len(parts):
        raise UserError(f"mixture {text!r}: a source is named twice; give each once, with all its epochs")
    return parts


@dataclass(frozen=True)
class Mixture:
    """Token arrays with the epochs of each. Where one array is expected (`row_batch`, `unigram_perplexity`) it serves too."""

    parts: tuple[Tokens, ...]
    epochs: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, key: slice) -> np.ndarray:
        """Ids of a span of the parts laid end to end."""
        return join_tokens(list(self.parts), "mixture")[key]

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs in the whole mixture, (vocab_size,), epochs counted."""
        each = [epochs * token_counts(part, vocab_size) for part, epochs in zip(self.parts, self.epochs, strict=True)]
        return np.sum(each, axis=0)

    def weights(self, seq_len: int) -> list[int]:
        """Rows of each source in the whole mixture."""
        rows = [rows_per_epoch(part, seq_len) for part in self.parts]
        return [max(1, round(n * epochs)) for n, epochs in zip(rows, self.epochs, strict=True)]

    def rows_drawn(self, position: int, seq_len: int) -> list[int]:
        """How many of the first `position` rows of the run come from each source."""
        return quotas(position, self.weights(seq_len))

    def tokens_drawn(self, position: int, seq_len: int) -> dict[str, int]:
        """Tokens of each source in the first `position` rows, by source name, for the log."""
        names = [part.name for part in self.parts]
        return {name: n * seq_len for name, n in zip(names, self.rows_drawn(position, seq_len), strict=True)}


def quotas(position: int, weights: list[int]) -> list[int]:
    """How many of the first `position` draws fall to each weight: sums to position, near the exact shares."""
    left, total, counts = position, sum(weights), []
    for weight in weights[:-1]:
        count = (2 * left * weight + total) // (2 * total)
        counts.append(count)
        left, total = left - count, total - weight
    return [*counts, left]


def draw(position: int, weights: list[int]) -> tuple[int, int]:
    """Which source draw number `position` falls to, and how many of that source came before it."""
    before, after = quotas(position, weights), quotas(position + 1, weights)
    source = next(n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    return source, before[source]


def join_tokens(parts: list[Tokens], name: str) -> Tokens:
    """Several token arrays as one, one after the other."""
    starts = np.cumsum([0] + [len(part) for part in parts[:-1]])
    ends = np.concatenate([part.document_ends + start for part, start in zip(parts, starts, strict=True)])
    shards = [shard for part in parts for shard in part.shards]
    return Tokens(shards, ends, parts[0].eos_id, name, parts[0].vocab_size)


class ShuffledTokens(Tokens):
    """The same tokens with whole documents in a seeded order; 16 bytes of memory per document."""

    def __init__(self, tokens: Tokens, seed: int) -> None:
        super().__init__(tokens.shards, tokens.document_ends, tokens.eos_id, tokens.name, tokens.vocab_size)
        starts = np.concatenate([[0], np.asarray(tokens.document_ends[:-1])]).astype(np.int64)
        order = np.argsort(_scramble(np.arange(len(starts), dtype=np.uint64), seed), kind="stable")
        self._origin = starts[order]
        self.document_ends = np.cumsum((np.asarray(tokens.document_ends) - starts)[order])

    def _span(self, start: int, stop: int) -> np.ndarray:
        parts = []
        document = int(np.searchsorted(self.document_ends, start, side="right"))
        while start < stop:
            end = int(self.document_ends[document])
            begin = int(self.document_ends[document - 1]) if document else 0
            origin = int(self._origin[document])
            parts.append(super()._span(origin + start - begin, origin + min(stop, end) - begin))
            start, document = min(stop, end), document + 1
        return np.concatenate(parts) if parts else super()._span(0, 0)


def shuffle_documents(tokens: Any, seed: int) -> Any:
    """Tokens (or each part of a Mixture) with their documents in a seeded order: neighbours in a row are then strangers."""
    if isinstance(tokens, Mixture):
        return Mixture(tuple(ShuffledTokens(part, seed) for part in tokens.parts), tokens.epochs)
    return ShuffledTokens(tokens, seed)


def _scramble(index: np.ndarray, seed: int) -> np.ndarray:
    """64 well-mixed bits of each index (SplitMix64's finaliser), the same on every machine and numpy."""
    value = index ^ np.uint64(mix64(seed, 11))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    return value ^ (value >> np.uint64(31))

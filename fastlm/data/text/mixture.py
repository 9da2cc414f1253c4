"""Several texts in stated proportions, without more state than the position.

A mixture "a:4, b:0.25" is four epochs of a and a quarter of b, w_i = epochs_i * rows_i rows of
each. The first n rows of the run hold c_i(n) of text i: c_1(n) = round(n w_1 / W), the rest shared
among the others the same way, so every prefix has the stated proportions to within half a row per
text, and which text row n comes from follows from n alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastlm.data.order import mix64
from fastlm.data.text.tokens import Tokens, TokenSource
from fastlm.errors import UserError

_SOURCE = re.compile(r"(?P<name>.+?)(?::(?P<epochs>\d+(?:\.\d+)?|\.\d+))?$")


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Names and epochs of "wikitext-103:4, tinystories:0.25" (1 where no number is given).

    Raises UserError where one is empty, has no epochs, or is named twice.
    """
    sources = []
    for part in text.split(","):
        match = _SOURCE.match(part.strip())
        if match is None:
            raise UserError(
                f'mixture {text!r}: an empty part; expected "source:epochs, source:epochs"'
            )
        epochs = float(match["epochs"] or 1)
        if epochs <= 0:
            raise UserError(
                f"mixture {text!r}: {match['name']} has {epochs:g} epochs; expected more than 0"
            )
        sources.append((match["name"].strip(), epochs))
    if len({name for name, _ in sources}) < len(sources):
        raise UserError(
            f"mixture {text!r}: a source is named twice; give each once, with all its epochs"
        )
    return sources


@dataclass(frozen=True)
class Mixture:
    """Texts with the epochs of each in one pass over the mixture. A TokenSource."""

    texts: tuple[TokenSource, ...]
    epochs: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.texts))

    def __getitem__(self, key: slice) -> np.ndarray:
        """Ids of a span of the texts laid end to end."""
        start, stop, step = key.indices(len(self))
        spans = []
        begin = 0
        for text in self.texts:
            spans.append(text[max(0, start - begin) : max(0, stop - begin)])
            begin += len(text)
        return np.concatenate(spans)[::step]

    def rows(self, seq_len: int) -> int:
        """See TokenSource."""
        return sum(self.weights(seq_len))

    def rows_at(self, position: int, count: int, seq_len: int, seed: int) -> np.ndarray:
        """See TokenSource: each row from the text whose turn it is."""
        rows = np.empty((count, seq_len + 1), np.int64)
        turns = list(draw(position, count, self.weights(seq_len)))
        for which, text in enumerate(self.texts):
            own = [number for number, (turn, _) in enumerate(turns) if turn == which]
            if own:
                first = turns[own[0]][1]  # the others follow: the text's rows are taken in order
                rows[own] = text.rows_at(first, len(own), seq_len, mix64(seed, which))
        return rows

    def tokens_drawn(self, position: int, seq_len: int) -> dict[str, int]:
        """See TokenSource."""
        drawn: dict[str, int] = {}
        for text, n_rows in zip(self.texts, self.rows_drawn(position, seq_len), strict=True):
            drawn |= text.tokens_drawn(n_rows, seq_len)
        return drawn

    def counts(self, vocab_size: int) -> np.ndarray:
        """See TokenSource."""
        each = [
            epochs * text.counts(vocab_size)
            for text, epochs in zip(self.texts, self.epochs, strict=True)
        ]
        return np.sum(each, axis=0)

    def most_documents(self, batches: range, seq_len: int, seed: int) -> int:
        """See TokenSource: of each text the fullest of as many rows as a batch may take of it."""
        weights = self.weights(seq_len)
        drawn = np.array([quotas(position, weights) for position in [*batches, batches.stop]])
        most = 0
        for which, text in enumerate(self.texts):
            rows = int(np.diff(drawn[:, which]).max())
            own = range(0, int(drawn[-1, which]), max(1, rows))
            most += text.most_documents(own, seq_len, mix64(seed, which)) if rows else 0
        return most

    def weights(self, seq_len: int) -> list[int]:
        """Rows of each text in one pass."""
        rows = [text.rows(seq_len) for text in self.texts]
        return [max(1, round(n * epochs)) for n, epochs in zip(rows, self.epochs, strict=True)]

    def rows_drawn(self, position: int, seq_len: int) -> list[int]:
        """How many of the first `position` rows of the run come from each text."""
        return quotas(position, self.weights(seq_len))


def quotas(position: int, weights: list[int]) -> list[int]:
    """How many of the first `position` draws fall to each weight; they sum to position."""
    left = position
    total = sum(weights)
    counts = []
    for weight in weights[:-1]:
        count = (2 * left * weight + total) // (2 * total)
        counts.append(count)
        left -= count
        total -= weight
    return [*counts, left]


def draw(position: int, count: int, weights: list[int]) -> Iterator[tuple[int, int]]:
    """Draws position, ..., position + count - 1: whose turn it is, and how often it was before."""
    before = quotas(position, weights)
    for number in range(position + 1, position + count + 1):
        after = quotas(number, weights)
        which = next(n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        yield which, before[which]
        before = after


def join_tokens(texts: list[Tokens], name: str) -> Tokens:
    """Several texts as one, one after the other."""
    starts = np.cumsum([0] + [len(text) for text in texts[:-1]])
    ends = np.concatenate(
        [text.document_ends + start for text, start in zip(texts, starts, strict=True)]
    )
    shards = [shard for text in texts for shard in text.shards]
    return Tokens(shards, ends, texts[0].eos_id, name, texts[0].vocab_size)

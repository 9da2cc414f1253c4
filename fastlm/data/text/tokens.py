"""Token shards read back as one long array, after sizes and manifest were checked.

A prepared folder holds manifest.json and, for each split, SPLIT-00000.bin, SPLIT-00001.bin, ...
(token ids, little endian, uint16 where the vocabulary fits, else uint32) and SPLIT.documents.bin
(int64: the position after each document). Every document ends with the end-of-text token.

Rows for training are drawn by one counter. Epoch e of a text of N tokens is cut into floor((N - 1)
/ T) rows of T + 1 tokens that overlap by one (row r gives inputs [r T, r T + T) and targets shifted
by one), from a phase of its own, so that the leftover is not always the same. Row number p of the
run is row perm_e(p mod n_rows) of epoch e = p // n_rows (fastlm.data.order).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastlm import files
from fastlm.data.order import mix64, permutation_keys, permute, scramble
from fastlm.data.text.manifest import MANIFEST, MEND, SPLITS, Manifest, file_in, read_manifest
from fastlm.errors import UserError, printable
from fastlm.tokenizer import Tokenizer

BLOCK = 1 << 22  # items read at a time where a whole file is gone through


class TokenSource(Protocol):
    """What training rows are drawn from: one text, or several in stated proportions."""

    def __len__(self) -> int:
        """Tokens in all."""

    def __getitem__(self, key: slice) -> np.ndarray:
        """The ids of a span."""

    def rows(self, seq_len: int) -> int:
        """Rows of seq_len tokens in one pass; UserError where a text is shorter than one row."""

    def rows_at(self, position: int, count: int, seq_len: int, seed: int) -> np.ndarray:
        """Rows position, ..., position + count - 1 of the run: ids, (count, seq_len + 1) int64."""

    def tokens_drawn(self, position: int, seq_len: int) -> dict[str, int]:
        """Tokens in the first `position` rows of the run, by the name of their text."""

    def counts(self, vocab_size: int) -> np.ndarray:
        """How often each id is met in one pass, (vocab_size,)."""

    def most_documents(self, batches: range, seq_len: int, seed: int) -> int:
        """The most documents, or parts of them, that a batch of the run may hold.

        batches: their positions, each of batches.step rows. Counted from the documents' ends, not
        from the ids.
        """


class Tokens:
    """One text: token ids over memory-mapped shards, with the end of every document. A TokenSource.

    len(tokens) counts tokens; tokens[a:b] is a numpy copy of the ids in [a, b); tokens[i] is one
    id. `document_ends` is an int64 array, (n_documents,): the position after each document's
    end-of-text. Where vocab_size is given, reading an id outside it raises UserError: shards may
    come from a stranger, and an id is an index into the embedding.
    """

    def __init__(
        self,
        shards: list[np.ndarray],
        document_ends: np.ndarray,
        eos_id: int,
        name: str = "tokens",
        vocab_size: int | None = None,
    ) -> None:
        # Slicing a memmap object is slow.
        self.shards = [np.asarray(shard).view(np.ndarray) for shard in shards]
        self.document_ends = document_ends
        self.eos_id = eos_id
        self.name = name
        self.vocab_size = vocab_size
        self._starts = np.concatenate([[0], np.cumsum([len(s) for s in shards])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: int | slice) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            ids = self._checked(self._span(start, max(start, stop)))
            return ids if step == 1 else ids[::step]
        index = key + len(self) if key < 0 else key
        if not 0 <= index < len(self):
            raise IndexError(f"token {key} of {len(self)}")
        return int(self._checked(self._span(index, index + 1))[0])

    def _span(self, start: int, stop: int) -> np.ndarray:
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        spans = []
        while start < stop:
            base = int(self._starts[shard])
            spans.append(self.shards[shard][start - base : stop - base])
            start += len(spans[-1])
            shard += 1
        if not spans:
            return np.empty(0, self.shards[0].dtype if self.shards else np.uint16)
        return np.array(spans[0]) if len(spans) == 1 else np.concatenate(spans)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        """The ids, if none is outside the vocabulary."""
        if self.vocab_size is not None and ids.size and ids.max() >= self.vocab_size:
            known = f"its tokenizer has {self.vocab_size}"
            raise UserError(f"{self.name}: holds the id {ids.max()}, {known}; {MEND}")
        return ids

    def document(self, index: int) -> np.ndarray:
        """The ids of one document with its end-of-text."""
        start = int(self.document_ends[index - 1]) if index > 0 else 0
        return self[start : int(self.document_ends[index])]

    def rows(self, seq_len: int) -> int:
        """See TokenSource."""
        if seq_len < 1:
            raise UserError(f"sequence length: got {seq_len}; expected at least 1")
        n_rows = (len(self) - 1) // seq_len
        if n_rows < 1:
            raise UserError(
                f"sequence length {seq_len} is longer than the data ({self.name}: {len(self):,} "
                f"tokens, one row needs {seq_len + 1:,}); shorten the sequence or give more text"
            )
        return n_rows

    def rows_at(self, position: int, count: int, seq_len: int, seed: int) -> np.ndarray:
        """See TokenSource."""
        rows = np.empty((count, seq_len + 1), np.int64)
        for row, start in zip(rows, self.row_starts(position, count, seq_len, seed), strict=True):
            row[:] = self._span(start, start + seq_len + 1)
        return self._checked(rows)  # all at once: a row at a time costs a microsecond each

    def row_starts(self, position: int, count: int, seq_len: int, seed: int) -> list[int]:
        """The first token of rows position, ..., position + count - 1 of the run."""
        n_rows = self.rows(seq_len)
        starts = []
        for epoch, numbers in itertools.groupby(
            range(position, position + count), lambda number: number // n_rows
        ):
            keys = permutation_keys(seed, epoch)
            phase = self.phase(epoch, seq_len, seed)
            starts += [
                permute(number % n_rows, n_rows, keys) * seq_len + phase for number in numbers
            ]
        return starts

    def phase(self, epoch: int, seq_len: int, seed: int) -> int:
        """The token that an epoch's first row starts at."""
        spare = (len(self) - 1) % seq_len
        return mix64(seed, epoch, 0) % (spare + 1)

    def tokens_drawn(self, position: int, seq_len: int) -> dict[str, int]:
        """See TokenSource."""
        return {self.name: position * seq_len}

    def most_documents(self, batches: range, seq_len: int, seed: int) -> int:
        """See TokenSource: the fullest rows together, of the epochs that the run reaches."""
        n_rows = self.rows(seq_len)
        found = [np.zeros(0, np.int64)]
        for epoch in range(-(-batches.stop // n_rows)):
            starts = np.arange(n_rows) * seq_len + self.phase(epoch, seq_len, seed)
            before = np.searchsorted(self.document_ends, starts, side="right")
            behind = np.searchsorted(self.document_ends, starts + seq_len - 1, side="right")
            found.append(1 + behind - before)
        documents = np.sort(np.concatenate(found))
        return int(documents[max(0, len(documents) - batches.step) :].sum())

    def counts(self, vocab_size: int) -> np.ndarray:
        """See TokenSource."""
        return sum(
            (token_counts(shard, vocab_size) for shard in self.shards),
            np.zeros(vocab_size, np.int64),
        )


class ShuffledTokens(Tokens):
    """The same tokens with whole documents in a seeded order; 16 bytes of memory per document."""

    def __init__(self, tokens: Tokens, seed: int) -> None:
        super().__init__(
            tokens.shards, tokens.document_ends, tokens.eos_id, tokens.name, tokens.vocab_size
        )
        starts = np.concatenate([[0], np.asarray(tokens.document_ends[:-1])]).astype(np.int64)
        order = np.argsort(scramble(np.arange(len(starts), dtype=np.uint64), seed), kind="stable")
        self._origin = starts[order]
        self.document_ends = np.cumsum((np.asarray(tokens.document_ends) - starts)[order])

    def _span(self, start: int, stop: int) -> np.ndarray:
        spans = []
        document = int(np.searchsorted(self.document_ends, start, side="right"))
        while start < stop:
            end = min(stop, int(self.document_ends[document]))
            begin = int(self.document_ends[document - 1]) if document else 0
            shift = int(self._origin[document]) - begin
            spans.append(super()._span(shift + start, shift + end))
            start = end
            document += 1
        return np.concatenate(spans) if spans else super()._span(0, 0)


@dataclass(frozen=True)
class TokenData:
    """Prepared text: its folder, its manifest (None for several texts), and both splits."""

    folder: Path
    manifest: Manifest | None
    train: TokenSource
    validation: Tokens


def open_tokens(
    folder: Path, split: str, tokenizer: Tokenizer | None = None, verify: bool = False
) -> Tokens:
    """Open one split of a prepared folder.

    Sizes are always checked against the manifest; with verify=True the sha256 of every file and the
    range of every id are too. Raises UserError for a manifest that cannot be believed, a missing,
    truncated, unreadable or altered shard, an unknown split, or shards of another tokenizer than
    the one given.
    """
    return _open_split(Path(folder), read_manifest(Path(folder)), split, tokenizer, verify)


def open_data(folder: Path, tokenizer: Tokenizer | None = None, verify: bool = False) -> TokenData:
    """Open both splits of a prepared folder (see `open_tokens`)."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    train, validation = (
        _open_split(folder, manifest, split, tokenizer, verify) for split in SPLITS
    )
    return TokenData(folder, manifest, train, validation)


def _open_split(
    folder: Path, manifest: Manifest, split: str, tokenizer: Tokenizer | None, verify: bool
) -> Tokens:
    if tokenizer is not None:
        _check_tokenizer(folder, manifest, tokenizer)
    if split not in manifest.splits:
        raise UserError(f"{folder}: no split {split!r}; it has {', '.join(manifest.splits)}")
    made = manifest.tokenizer
    entry = manifest.splits[split]
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    shards = [
        map_file(file_in(folder, s.file), dtype, s.tokens, s.sha256 if verify else None)
        for s in entry.shards
    ]
    index_file = file_in(folder, entry.index.file)
    ends = map_file(
        index_file, np.dtype("<i8"), entry.documents, entry.index.sha256 if verify else None
    )
    check_document_ends(index_file, ends, entry.tokens)
    tokens = Tokens(
        shards, ends, made.eos_id, f"{printable(manifest.source)}/{split}", made.vocab_size
    )
    if verify:
        for start in range(0, len(tokens), BLOCK):
            tokens[start : start + BLOCK]  # reading checks the ids
    return tokens


def _check_tokenizer(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    made = manifest.tokenizer
    if made.hash != tokenizer.hash:
        raise UserError(
            f"{folder}: its tokens were made by tokenizer {printable(made.name)} "
            f"({printable(made.hash)}), this run uses {tokenizer.name} ({tokenizer.hash}); "
            "name the same tokenizer or prepare the text again"
        )
    if (made.vocab_size, made.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
        raise UserError(
            f"{folder / MANIFEST}: tokenizer of {made.vocab_size} ids that ends texts with "
            f"{made.eos_id}, expected {tokenizer.vocab_size} and {tokenizer.eos_id} for "
            f"{made.hash}; {MEND}"
        )


def map_file(file: Path, dtype: np.dtype, count: int, sha256: str | None) -> np.ndarray:
    """A file as a read-only array of `count` items, memory-mapped."""
    try:
        size = file.stat().st_size
        if size != count * dtype.itemsize:
            expected = f"{count * dtype.itemsize:,}"
            raise UserError(
                f"{file}: {size:,} bytes, expected {expected} (truncated or altered); {MEND}"
            )
        if sha256 is not None and files.sha256(file) != sha256:
            raise UserError(f"{file}: its content does not match the manifest's sha256; {MEND}")
        return np.memmap(file, dtype, mode="r") if count else np.empty(0, dtype)
    except OSError as error:
        raise UserError(f"{file}: unreadable shard ({error.strerror or error}); {MEND}") from error


def check_document_ends(file: Path, ends: np.ndarray, n_tokens: int) -> None:
    """UserError unless every document holds a token and the last ends with the tokens."""
    last = 0
    for start in range(0, len(ends), BLOCK):
        block = ends[start : start + BLOCK]
        if (np.diff(block, prepend=last) < 1).any():
            raise UserError(
                f"{file}: a document ends before it begins, expected rising positions; {MEND}"
            )
        last = int(block[-1])
    if last != n_tokens:
        raise UserError(
            f"{file}: the last document ends at {last:,}, expected the {n_tokens:,} tokens; {MEND}"
        )


def token_counts(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, (vocab_size,); UserError for one outside the vocabulary."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(ids), BLOCK):
        block = np.bincount(ids[start : start + BLOCK], minlength=vocab_size)
        if len(block) > vocab_size:
            raise UserError(
                f"tokens: an id is {len(block) - 1}, the vocabulary has {vocab_size}; {MEND}"
            )
        counts += block
    return counts


def unigram_perplexity(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Perplexity of validation text under the frequencies of training text: the bar to pass.

    exp(-sum_i c_val(i) ln p(i) / n_val), with p(i) = (c_train(i) + 1) / (n_train + vocab_size)
    (add-one smoothing). train_counts, validation_counts: (vocab_size,), as `token_counts` gives
    them.
    """
    n_train = train_counts.sum()
    n_validation = validation_counts.sum()
    if not n_train or not n_validation:
        raise UserError(
            f"unigram perplexity: {n_train} training and {n_validation} validation tokens; "
            "need both"
        )
    smoothed = train_counts + 1.0
    log_p = np.log(smoothed) - math.log(smoothed.sum())
    return math.exp(-float(validation_counts @ log_p) / n_validation)

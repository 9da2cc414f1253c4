"""Token shards on disk, read as one long array: sizes and manifest are checked before anything is trained on.

A prepared folder holds manifest.json and, for each split, `<split>-00000.bin`, `<split>-00001.bin`, ... (token ids, little
endian, uint16 where the vocabulary fits, else uint32) and `<split>.documents.bin` (int64: the position after each document).
Every document ends with the end-of-text token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlm import files
from fastlm.data.text.manifest import MANIFEST, MEND, SPLITS, Manifest, file_in, read_manifest
from fastlm.errors import UserError, printable
from fastlm.tokenizer import Tokenizer

BLOCK = 1 << 22  # items read at a time where a whole file is gone through


class Tokens:
    """One long array of token ids over memory-mapped shards, with the end of every document.

    len(tokens) counts tokens; tokens[a:b] is a numpy copy of the ids in [a, b); tokens[i] is one id. `document_ends` is an
    int64 array, (n_documents,): the position after each document's end-of-text. Where vocab_size is given, reading an id
    outside it raises UserError: shards may come from a stranger, and an id is an index into the embedding.
    """

    def __init__(
        self,
        shards: list[np.ndarray],
        document_ends: np.ndarray,
        eos_id: int,
        name: str = "tokens",
        vocab_size: int | None = None,
    ) -> None:
        self.shards = [np.asarray(shard).view(np.ndarray) for shard in shards]  # slicing a memmap object is slow
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
            part = self._span(start, max(start, stop))
            return part if step == 1 else part[::step]
        index = key + len(self) if key < 0 else key
        if not 0 <= index < len(self):
            raise IndexError(f"token {key} of {len(self)}")
        return int(self._span(index, index + 1)[0])

    def _span(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop:
            base = int(self._starts[first])
            part = self.shards[first][start - base : stop - base]
            parts.append(part)
            start += len(part)
            first += 1
        if not parts:
            return np.empty(0, self.shards[0].dtype if self.shards else np.uint16)
        ids = np.array(parts[0]) if len(parts) == 1 else np.concatenate(parts)
        if self.vocab_size is not None and int(ids.max()) >= self.vocab_size:
            raise UserError(f"{self.name}: holds the id {ids.max()}, its tokenizer has {self.vocab_size}; {MEND}")
        return ids

    def document(self, index: int) -> np.ndarray:
        """The ids of one document with its end-of-text."""
        return self[int(self.document_ends[index - 1]) if index > 0 else 0 : int(self.document_ends[index])]


@dataclass(frozen=True)
class TokenData:
    """A prepared source: its folder, manifest, and both splits."""

    folder: Path
    manifest: Manifest | None  # None for a mixture
    train: Any  # Tokens, or a Mixture of them
    validation: Tokens


def open_tokens(folder: Path, split: str, tokenizer: Tokenizer | None = None, verify: bool = False) -> Tokens:
    """Open one split of a prepared folder.

    Sizes are always checked against the manifest; with verify=True the sha256 of every file and the range of every id are
    too. Raises UserError for a manifest that cannot be believed, a missing, truncated, unreadable or altered shard, an
    unknown split, or shards of another tokenizer than the one given.
    """
    return _open_split(Path(folder), read_manifest(Path(folder)), split, tokenizer, verify)


def open_data(folder: Path, tokenizer: Tokenizer | None = None, verify: bool = False) -> TokenData:
    """Open both splits of a prepared folder (see `open_tokens`)."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    train, validation = (_open_split(folder, manifest, split, tokenizer, verify) for split in SPLITS)
    return TokenData(folder, manifest, train, validation)


def _open_split(folder: Path, manifest: Manifest, split: str, tokenizer: Tokenizer | None, verify: bool) -> Tokens:
    made = manifest.tokenizer
    if tokenizer is not None and made.hash != tokenizer.hash:
        raise UserError(
            f"{folder}: its tokens were made by tokenizer {printable(made.name)} ({printable(made.hash)}), this run uses "
            f"{tokenizer.name} ({tokenizer.hash}); name the same tokenizer or prepare the text again"
        )
    if tokenizer is not None and (made.vocab_size, made.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
        raise UserError(
            f"{folder / MANIFEST}: tokenizer of {made.vocab_size} ids that ends texts with {made.eos_id}, expected "
            f"{tokenizer.vocab_size} and {tokenizer.eos_id} for {made.hash}; {MEND}"
        )
    if split not in manifest.splits:
        raise UserError(f"{folder}: no split {split!r}; it has {', '.join(manifest.splits)}")
    entry = manifest.splits[split]
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    shards = [map_file(file_in(folder, s.file), dtype, s.tokens, s.sha256 if verify else None) for s in entry.shards]
    index_file = file_in(folder, entry.index.file)
    ends = map_file(index_file, np.dtype("<i8"), entry.documents, entry.index.sha256 if verify else None)
    check_document_ends(index_file, ends, entry.tokens)
    tokens = Tokens(shards, ends, made.eos_id, f"{printable(manifest.source)}/{split}", made.vocab_size)
    if verify:
        for start in range(0, len(tokens), BLOCK):
            tokens[start : start + BLOCK]  # reading checks the ids
    return tokens


def map_file(file: Path, dtype: np.dtype, count: int, sha256: str | None) -> np.ndarray:
    """A file as a read-only array of `count` items, memory-mapped."""
    try:
        size = file.stat().st_size
        if size != count * dtype.itemsize:
            raise UserError(f"{file}: {size:,} bytes, expected {count * dtype.itemsize:,} (truncated or altered); {MEND}")
        if sha256 is not None and files.sha256(file) != sha256:
            raise UserError(f"{file}: its content does not match the manifest's sha256; {MEND}")
        return np.memmap(file, dtype, mode="r") if count else np.empty(0, dtype)
    except OSError as error:
        raise UserError(f"{file}: unreadable shard ({error.strerror or error}); {MEND}") from error


def check_document_ends(file: Path, ends: np.ndarray, n_tokens: int) -> None:
    """UserError unless every document has at least its end-of-text and the last ends with the tokens."""
    last = 0
    for start in range(0, len(ends), BLOCK):
        block = ends[start : start + BLOCK]
        if (np.diff(block, prepend=last) < 1).any():
            raise UserError(f"{file}: a document ends before it begins, expected rising positions; {MEND}")
        last = int(block[-1])
    if last != n_tokens:
        raise UserError(f"{file}: the last document ends at {last:,}, expected the {n_tokens:,} tokens; {MEND}")


def unigram_perplexity(train: Tokens | np.ndarray, validation: Tokens | np.ndarray, vocab_size: int) -> float:
    """Perplexity of validation text under the token frequencies of training text, the bar a model must pass.

    exp(-sum_i c_val(i) ln p(i) / n_val), with p(i) = (c_train(i) + 1) / (n_train + vocab_size) (add-one smoothing).
    """
    if not len(train) or not len(validation):
        raise UserError(f"unigram perplexity: {len(train)} training and {len(validation)} validation tokens; need both")
    counts = token_counts(train, vocab_size) + 1.0
    log_p = np.log(counts) - math.log(counts.sum())
    seen = token_counts(validation, vocab_size)
    return math.exp(-float(seen @ log_p) / len(validation))


def token_counts(tokens: Tokens | np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, (vocab_size,); reads BLOCK tokens at a time."""
    if hasattr(tokens, "counts"):  # a mixture
        return tokens.counts(vocab_size)
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), BLOCK):
        counts += np.bincount(tokens[start : start + BLOCK], minlength=vocab_size)
    return counts

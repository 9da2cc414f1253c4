"""Token shards on disk, read as one long array: sizes and manifest are checked before anything is trained on.

A prepared folder holds manifest.json and, for each split, `<split>-00000.bin`, `<split>-00001.bin`, ... (token ids, little
endian, uint16 where the vocabulary fits, else uint32) and `<split>.documents.bin` (int64: the position after each document).
Every document ends with the end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.errors import UserError
from fastlm.tokenizer import Tokenizer

FORMAT = 1
MANIFEST = "manifest.json"


class Tokens:
    """One long array of token ids over memory-mapped shards, with the end of every document.

    len(tokens) counts tokens; tokens[a:b] is a numpy copy of the ids in [a, b); tokens[i] is one id. `document_ends` is an
    int64 array, (n_documents,): the position after each document's end-of-text.
    """

    def __init__(self, shards: list[np.ndarray], document_ends: np.ndarray, eos_id: int, name: str = "tokens") -> None:
        self.shards = [np.asarray(shard).view(np.ndarray) for shard in shards]  # slicing a memmap object is slow
        self.document_ends = document_ends
        self.eos_id = eos_id
        self.name = name
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
        if len(parts) == 1:
            return np.array(parts[0])
        return np.concatenate(parts) if parts else np.empty(0, self.shards[0].dtype if self.shards else np.uint16)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document with its end-of-text."""
        return self[int(self.document_ends[index - 1]) if index > 0 else 0 : int(self.document_ends[index])]


@dataclass(frozen=True)
class TokenData:
    """A prepared source: its folder, manifest, and both splits."""

    folder: Path
    manifest: dict[str, Any]
    train: Any  # Tokens, or a Mixture of them
    validation: Tokens


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder; UserError where there is none that this version reads."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}; expected a folder written by `fastlm data prepare`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error}); delete the folder and prepare it again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "splits" not in manifest:
        raise UserError(f"{file}: not a manifest of format {FORMAT}; delete the folder and prepare it again")
    return manifest


def open_tokens(folder: Path, split: str, tokenizer: Tokenizer | None = None, verify: bool = False) -> Tokens:
    """Open one split of a prepared folder.

    Sizes are always checked against the manifest; with verify=True the sha256 of every file is too. Raises UserError for a
    missing, truncated, unreadable or altered shard, an unknown split, or shards of another tokenizer than the one given.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if tokenizer is not None and manifest["tokenizer"]["hash"] != tokenizer.hash:
        made = manifest["tokenizer"]
        raise UserError(
            f"{folder}: its tokens were made by tokenizer {made['name']} ({made['hash']}), this run uses "
            f"{tokenizer.name} ({tokenizer.hash}); name the same tokenizer or prepare the text again"
        )
    if split not in manifest["splits"]:
        raise UserError(f"{folder}: no split {split!r}; it has {', '.join(manifest['splits'])}")
    entry = manifest["splits"][split]
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    shards = [map_file(folder / s["file"], dtype, s["tokens"], s["sha256"] if verify else None) for s in entry["shards"]]
    index = entry["index"]
    ends = map_file(folder / index["file"], np.dtype("<i8"), index["documents"], index["sha256"] if verify else None)
    return Tokens(shards, ends, manifest["tokenizer"]["eos_id"], f"{manifest['source']}/{split}")


def open_data(folder: Path, tokenizer: Tokenizer | None = None, verify: bool = False) -> TokenData:
    """Open both splits of a prepared folder (see `open_tokens`)."""
    train, validation = (open_tokens(folder, split, tokenizer, verify) for split in ("train", "validation"))
    return TokenData(folder, read_manifest(folder), train, validation)


def map_file(file: Path, dtype: np.dtype, count: int, sha256: str | None) -> np.ndarray:
    """A file as a read-only array of `count` items, memory-mapped."""
    mend = "delete the folder and prepare it again"
    try:
        size = file.stat().st_size
        if size != count * dtype.itemsize:
            raise UserError(f"{file}: {size:,} bytes, expected {count * dtype.itemsize:,} (truncated or altered); {mend}")
        if sha256 is not None and file_sha256(file) != sha256:
            raise UserError(f"{file}: its content does not match the manifest's sha256; {mend}")
        return np.memmap(file, dtype, mode="r") if count else np.empty(0, dtype)
    except OSError as error:
        raise UserError(f"{file}: unreadable shard ({error.strerror or error}); {mend}") from error


def file_sha256(file: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def token_counts(tokens: Tokens | np.ndarray, vocab_size: int, block: int = 1 << 22) -> np.ndarray:
    """How often each id occurs, (vocab_size,); reads `block` tokens at a time."""
    if hasattr(tokens, "counts"):  # a mixture
        return tokens.counts(vocab_size)
    counts = np.zeros(vocab_size, np.int64)
    for shard in tokens.shards if isinstance(tokens, Tokens) else [tokens]:
        for start in range(0, len(shard), block):
            counts += np.bincount(shard[start : start + block], minlength=vocab_size)
    return counts

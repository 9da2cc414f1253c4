"""Text to token shards: tokenised once, written atomically, resumed after a kill, reused ever after.

    pieces of text -> batches of about 256 KB -> ids (in parallel) -> <folder>.partial/*.bin + journal.json -> <folder>/

The journal is written after the data it speaks of is on disk; a run that was killed truncates the data to the last journal
and goes on from there, so its result is byte-identical to that of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastlm import files
from fastlm.data.hub import HubOffline
from fastlm.data.sources import HELD_OUT_EVERY, Piece, Source, open_source
from fastlm.data.text.dedup import Duplicates, drop_duplicates
from fastlm.data.text.encode import encode_batches
from fastlm.data.text.manifest import DEFAULTS, FORMAT, MANIFEST, Settings, read_manifest
from fastlm.data.text.mixture import Mixture, ShuffledTokens, join_tokens, parse_mixture
from fastlm.data.text.tokens import TokenData, Tokens, open_data, open_tokens, unigram_perplexity
from fastlm.data.text.writer import SplitWriter, top_up_validation
from fastlm.errors import UserError
from fastlm.tokenizer import Tokenizer

__all__ = ["Settings", "TokenData", "Tokens", "open_data", "open_tokens", "prepare", "unigram_perplexity"]

BATCH_CHARS = 1 << 18
JOURNAL_EVERY = 64  # batches
MIN_TOKENS = 256  # less than this is no text to train on

Progress = Callable[[int, int | None, int], None]


def prepare(
    source: str,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
    settings: Settings = DEFAULTS,
    workers: int | None = None,
) -> TokenData:
    """Tokens of a source, from the cache where it holds them, else tokenised into it.

    source: a name for `open_source`, a folder that `prepare` wrote, or a mixture ("a:4, b:0.25": the result's train is then
    a Mixture, its validation the documents of all parts in a mixed order). progress(bytes of text done, bytes in all or None,
    tokens so far) is called after each batch. workers: processes that tokenise (None: as many as cores, or none for a small
    text). The cache key is the source with its revision, the tokenizer's hash and the settings. Another process that
    prepares the same waits for the first. Raises UserError for anything wrong with the source, for text that is too short,
    and for a full or read-only disk. Without the
    network a hub name gives what the cache holds of it.
    """
    ready = Path(source).expanduser()
    if not ready.exists():
        parts = parse_mixture(source)
        if len(parts) > 1 or parts[0][0] != source:
            return _prepare_mixture(parts, tokenizer, cache, progress, settings, workers)
    if (ready / MANIFEST).is_file():
        return open_data(ready, tokenizer)
    try:
        opened = open_source(source, settings.text_field, settings.on_bad_row)
    except HubOffline:
        kept = _prepared_before(source, tokenizer, Path(cache), settings)
        if kept is None:
            raise
        return open_data(kept, tokenizer)
    return prepare_source(opened, tokenizer, Path(cache), progress, settings, workers)


def _prepare_mixture(
    parts: list[tuple[str, float]],
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None,
    settings: Settings,
    workers: int | None,
) -> TokenData:
    data = [prepare(name, tokenizer, cache, progress, settings, workers) for name, _ in parts]
    epochs = tuple(epochs for _, epochs in parts)
    validation = ShuffledTokens(join_tokens([d.validation for d in data], "mixture/validation"), seed=0)
    return TokenData(Path(cache), None, Mixture(tuple(d.train for d in data), epochs), validation)


def _prepared_before(name: str, tokenizer: Tokenizer, cache: Path, settings: Settings) -> Path | None:
    """The newest folder of the cache with this source, tokenizer and settings, of whatever revision."""
    found = []
    for file in cache.glob(f"*/{MANIFEST}"):
        try:
            manifest = read_manifest(file.parent)
        except UserError:  # a damaged folder is no help here
            continue
        if (manifest.source, manifest.tokenizer.hash, manifest.settings) == (name, tokenizer.hash, settings):
            found.append((file.stat().st_mtime, file.parent))
    return max(found)[1] if found else None


def prepare_source(
    source: Source,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
    settings: Settings = DEFAULTS,
    workers: int | None = None,
) -> TokenData:
    """`prepare` for a source that is already open."""
    key = [FORMAT, source.name, source.fingerprint, tokenizer.hash, asdict(settings)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    label = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(source.name).name or source.name).strip("-.") or "text"
    folder = cache / f"{label}-{digest}"
    return write_folder(source, tokenizer, folder, progress, settings, workers)


def write_folder(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    progress: Progress | None = None,
    settings: Settings = DEFAULTS,
    workers: int | None = None,
) -> TokenData:
    """Tokenise a source into `folder`, unless it is already there."""
    if (folder / MANIFEST).is_file():
        return open_data(folder, tokenizer)
    partial = folder.with_name(folder.name + ".partial")
    try:
        with files.disk_errors("write", folder):
            files.make_folder(folder.parent)
            with files.lock(folder.with_name(folder.name + ".lock")):
                if not (folder / MANIFEST).is_file():  # another process may have written it while this one waited
                    _write(source, tokenizer, partial, progress, settings, workers)
                    files.move_into_place(partial, folder)
    except files.DiskError as error:
        if error.disk_is_full:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except UserError:
        if source.size_bytes is not None:  # a mended file is another source; a hub is read on from here
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_data(folder, tokenizer)


def _write(
    source: Source,
    tokenizer: Tokenizer,
    partial: Path,
    progress: Progress | None,
    settings: Settings,
    workers: int | None,
) -> None:
    """Fill the partial folder, from its journal where there is one, and close it with the manifest."""
    state = _resume(partial, [source.name, source.fingerprint, tokenizer.hash, asdict(settings)])
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    writers = {split: SplitWriter(partial, split, dtype, state["splits"][split]) for split in ("train", "validation")}
    holding_out = "validation" not in source.splits
    duplicates = Duplicates(settings.dedup, *state["duplicates"])
    source.bad.count, source.bad.examples = state["bad_rows"][0], list(state["bad_rows"][1])
    try:
        for split in source.splits:
            if split in state["finished"]:
                continue
            pieces = source.pieces(split)
            if not tokenizer.cut_safe or duplicates.mode != "none":
                pieces = _whole(pieces)
            if duplicates.mode != "none":
                pieces = drop_duplicates(pieces, duplicates)
            # Which pieces went into the shards is a count: a piece is read again, but not tokenised again.
            number = sum(1 for piece in itertools.islice(pieces, state["pieces"]) if piece.ends)
            batches = encode_batches(tokenizer, _batches(pieces), dtype, workers)
            for n_batch, batch in enumerate(batches, 1):
                for piece, ids in zip(batch.pieces, batch.ids, strict=True):
                    target = "validation" if holding_out and _held_out(number) else split
                    writers[target].append(ids)
                    if piece.ends:
                        writers[target].end_document(tokenizer.eos_id)
                        number += 1
                state["text_bytes"] += batch.text_bytes
                state["pieces"] += len(batch.pieces)
                if n_batch % JOURNAL_EVERY == 0:
                    _journal(partial, state, writers)
                if progress is not None:
                    progress(state["text_bytes"], source.size_bytes, sum(w.tokens for w in writers.values()))
            # What was left out is counted anew whenever a split is read again, and kept once it is finished.
            state |= {"pieces": 0, "finished": [*state["finished"], split]}
            state |= {"duplicates": [duplicates.exact, duplicates.near]}
            state |= {"bad_rows": [source.bad.count, source.bad.examples]}
            _journal(partial, state, writers)
    finally:
        for writer in writers.values():
            writer.close()
    total = sum(w.tokens for w in writers.values())
    if total < MIN_TOKENS or not writers["train"].tokens:
        raise UserError(f"data source {source.name!r}: {total} tokens; expected at least {MIN_TOKENS}; name a longer text")
    if holding_out:
        top_up_validation(partial, writers, dtype, tokenizer.eos_id)
    manifest = {
        "format": FORMAT,
        "source": source.name,
        "fingerprint": source.fingerprint,
        "settings": asdict(settings),
        "tokenizer": {k: getattr(tokenizer, k) for k in ("name", "hash", "vocab_size", "eos_id")},
        "dtype": dtype.newbyteorder("=").name,
        "text_bytes": state["text_bytes"],
        "bad_rows": {"count": source.bad.count, "examples": source.bad.examples},
        "duplicates": {"exact": duplicates.exact, "near": duplicates.near},
        "splits": {split: writer.manifest() for split, writer in writers.items()},
    }
    (partial / "journal.json").unlink(missing_ok=True)
    files.write_json(partial / MANIFEST, manifest)


def _held_out(number: int) -> bool:
    """Whether document `number` is validation: one of each HELD_OUT_EVERY, none of the first (see top_up_validation)."""
    group, place = divmod(number, HELD_OUT_EVERY)
    chosen = hashlib.blake2b(group.to_bytes(8, "little"), digest_size=8).digest()
    return group > 0 and int.from_bytes(chosen, "little") % HELD_OUT_EVERY == place


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 64
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _whole(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Whole documents, for a tokenizer that may not be given parts."""
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends:
            yield Piece("".join(parts), True)
            parts = []


def _resume(partial: Path, key: list) -> dict[str, Any]:
    """The state to go on from: the journal's, with the files cut to it, or an empty folder and a fresh state."""
    fresh = {"key": key, "pieces": 0, "text_bytes": 0, "finished": [], "duplicates": [0, 0], "bad_rows": [0, []]}
    fresh["splits"] = {split: {"tokens": 0, "documents": 0} for split in ("train", "validation")}
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = json.loads((partial / "journal.json").read_bytes())
        if state["key"] == json.loads(json.dumps(key)):
            dtype = np.dtype(state["dtype"])
            writers = [SplitWriter(partial, split, dtype, counts) for split, counts in state["splits"].items()]
            for writer in writers:
                writer.close()
            if all(writer.truncate(writer.tokens, writer.documents) for writer in writers):
                files.remove_leftovers(partial)
                return state
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return fresh


def _journal(partial: Path, state: dict[str, Any], writers: dict[str, SplitWriter]) -> None:
    state["splits"] = {split: writer.flush() for split, writer in writers.items()}
    state["dtype"] = writers["train"].dtype.str
    files.write_json(partial / "journal.json", state)

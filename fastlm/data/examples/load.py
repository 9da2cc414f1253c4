"""Instructions and preferences by name: packed rows, and an account of every record read.

records -> dialogues -> ids and counted targets -> truncation that keeps the response ->
best-fit-decreasing rows
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlm.data.catalogue import open_source
from fastlm.data.examples.cache import read_cache, write_cache
from fastlm.data.examples.formats import RecordProblem, read_dialogue, read_preference
from fastlm.data.examples.packing import PackedRows, pack
from fastlm.data.examples.report import Examples, Report
from fastlm.data.examples.templates import (
    EncodedSequence,
    encode_dialogue,
    template_of,
    template_source,
)
from fastlm.data.examples.truncate import last_response, response_start, truncate, truncate_pair
from fastlm.data.records import Record
from fastlm.data.source import Source, splits_of_a_run
from fastlm.errors import UserError
from fastlm.tokenizer import Tokenizer

CACHE_FORMAT = 3

# A record's fields to its sequences, or None where nothing is left of them; what happened is noted
# in the report.
Encode = Callable[[dict[str, Any], Report], list[EncodedSequence] | None]


def load_instructions(
    name: str,
    tokenizer: Tokenizer,
    max_len: int,
    template: str = "auto",
    on_bad_row: str = "fail",
    held_out: float = 0.05,
    cache: Path | None = None,
) -> Examples:
    """Instruction examples of a source, each at most max_len + 1 ids (max_len slots).

    The last response is always kept. name: as in `open_source`. Where the source has no validation
    split, a share `held_out` of its examples is held out, chosen by a hash of the prompt, so that
    all answers to one prompt stay on one side. cache: a folder that keeps the result, keyed by the
    source's revision, the tokenizer and every setting. Raises UserError for bad records (unless
    on_bad_row="skip") and where nothing is left.
    """

    def encode(fields: dict[str, Any], report: Report) -> list[EncodedSequence] | None:
        dialogue = read_dialogue(fields)
        report.template = template_of(dialogue, template)
        sequence = truncate(encode_dialogue(dialogue, tokenizer, template), max_len + 1, report)
        return None if sequence is None else [sequence]

    template_text = template_source(template, tokenizer)
    key = ["instructions", tokenizer.hash, max_len, template_text, on_bad_row, held_out]
    return _load(name, encode, on_bad_row, held_out, cache, key)


def load_preferences(
    name: str,
    tokenizer: Tokenizer,
    max_len: int,
    template: str = "auto",
    on_bad_row: str = "fail",
    held_out: float = 0.05,
    cache: Path | None = None,
) -> Examples:
    """Preference pairs as sequences chosen, rejected, ..., each at most max_len + 1 ids.

    Only the last turn is counted. A pair's prompt is shortened the same way on both sides. See
    `load_instructions`.
    """

    def encode(fields: dict[str, Any], report: Report) -> list[EncodedSequence] | None:
        pair = read_preference(fields)
        report.template = template_of(pair.chosen, template)
        chosen, rejected = (
            last_response(encode_dialogue(side, tokenizer, template)) for side in pair
        )
        return truncate_pair(chosen, rejected, max_len + 1, report)

    template_text = template_source(template, tokenizer)
    key = ["preferences", tokenizer.hash, max_len, template_text, on_bad_row, held_out]
    return _load(name, encode, on_bad_row, held_out, cache, key)


def pack_examples(
    examples: Examples, row_len: int, group: int = 1, share: bool = False
) -> tuple[PackedRows, PackedRows | None]:
    """Both splits packed into rows of row_len slots (validation None where nothing was held out).

    group=2 for pairs: a row must then hold both answers with their prompts (2 max_len), and rows of
    4 max_len waste least; with share=True each pair holds its prompt once.
    """
    validation = pack(examples.validation, row_len, group, share) if examples.validation else None
    return pack(examples.train, row_len, group, share), validation


def _load(
    name: str,
    encode: Encode,
    on_bad_row: str,
    held_out: float,
    cache: Path | None,
    settings: list[Any],
) -> Examples:
    """The examples from the cache where it has them, else read, encoded and kept there."""
    source = open_source(name, "examples", on_bad_row=on_bad_row)
    if cache is None:
        return _read(source, encode, held_out)
    key = json.dumps([CACHE_FORMAT, name, source.fingerprint, settings])
    file = cache / f"examples-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    kept = read_cache(file)
    if kept is not None:
        return kept
    examples = _read(source, encode, held_out)
    write_cache(file, examples)
    return examples


def _read(source: Source, encode: Encode, held_out: float) -> Examples:
    report = Report(source.name, bad=source.bad)
    splits = splits_of_a_run(source)
    sequences: dict[str, list[EncodedSequence]] = {"train": [], "validation": []}
    for split in splits:
        share = held_out if "validation" not in splits else 0.0
        for part in source.splits[split]:
            if part.records is not None:
                for record in part.records(source.bad):
                    _encode_record(record, encode, report, share, sequences, split)
    report.read += report.bad.count
    if not sequences["train"]:
        raise UserError(
            f"data source {source.name!r}: no example is left to train on ({report.line()})"
        )
    return Examples(sequences["train"], sequences["validation"], report)


def _encode_record(
    record: Record,
    encode: Encode,
    report: Report,
    held_out: float,
    sequences: dict[str, list[EncodedSequence]],
    split: str,
) -> None:
    """Add a record's sequences to its split, or to validation where its prompt is held out."""
    try:
        encoded = encode(record.fields, report)
    except RecordProblem as problem:
        report.bad.add(record.place, str(problem))
        return
    report.read += 1  # those that are bad are counted by report.bad
    if encoded is None:
        return
    report.kept += 1
    sequences["validation" if _is_held_out(encoded[0], held_out) else split] += encoded


def _is_held_out(sequence: EncodedSequence, share: float) -> bool:
    prompt = sequence.ids[: max(1, response_start(sequence))]
    digest = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64

"""Instruction and preference data from a name to packed rows, with an account of every row that was read.

rows -> dialogues -> ids and counted targets -> truncation that keeps the response -> best-fit-decreasing rows
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlm import files
from fastlm.data.examples.formats import RowProblem, read_dialogue, read_preference
from fastlm.data.examples.packing import PackedRows, pack
from fastlm.data.examples.templates import Encoded, encode_dialogue, template_of, template_source
from fastlm.data.functions import function_rows
from fastlm.data.records import BadRows, read_json_rows, read_parquet_rows
from fastlm.errors import UserError
from fastlm.schema import parse
from fastlm.tokenizer import Tokenizer

EXAMPLE_HUB_NAMES = {"alpaca": "tatsu-lab/alpaca", "hh-rlhf": "Anthropic/hh-rlhf"}
CACHE_FORMAT = 2
CACHE_ARRAYS = {"ids": "int32", "counted": "bool", "ends": "int64"}
# What zipfile, zlib, numpy's header parser and ours raise for a file that is not whole, whichever of its bytes is wrong.
CACHE_ERRORS = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, MemoryError, SyntaxError,
                zipfile.BadZipFile, zlib.error, UserError)  # fmt: skip
MIN_PROMPT_SHARE = 0.25  # of max_len: what truncation leaves of a longer prompt at least


@dataclass
class Report:
    """What became of the rows of one source: kept + dropped + bad = read; template: how the last of them became text."""

    source: str
    read: int = 0
    kept: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    dropped: int = 0
    template: str = ""
    bad: BadRows = field(default_factory=lambda: BadRows("fail"))

    def line(self) -> str:
        """One line for the user."""
        text = f"{self.source}: {self.read:,} rows read, {self.kept:,} kept"
        counts = {
            "prompts shortened": self.prompts_truncated,
            "responses shortened (their end-of-text is not trained)": self.responses_truncated,
            "dropped (nothing counted is left)": self.dropped,
            "bad": self.bad.count,
        }
        text += "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        return text + (f" (first: {self.bad.examples[0]})" if self.bad.examples else "")


Rows = Iterator[tuple[str, dict[str, Any]]]
Encode = Callable[[dict[str, Any], Report], list[Encoded] | None]


class Splits(NamedTuple):
    """What identifies a source, and its rows by split; those that cannot be read go to the BadRows given."""

    fingerprint: str
    rows: dict[str, Callable[[BadRows], Rows]]


class Examples(NamedTuple):
    """Encoded sequences of one source (two a pair for preferences), by split, and the account of its rows."""

    train: list[Encoded]
    validation: list[Encoded]
    report: Report


def load_instructions(
    source: str,
    tokenizer: Tokenizer,
    max_len: int,
    template: str = "auto",
    on_bad_row: str = "fail",
    held_out: float = 0.05,
    cache: Path | None = None,
) -> Examples:
    """Instruction examples of a source, each at most max_len + 1 ids (max_len slots), its last response always kept.

    source: a .jsonl, .json or .parquet file, a folder of them, "alpaca", or org/name of the hub. Where the source has no
    validation split, a share `held_out` of its examples is held out, chosen by a hash of the prompt, so that all answers
    to one prompt stay on one side. cache: a folder that keeps the result, keyed by the source's revision, the tokenizer and
    every setting. Raises UserError for bad rows (unless on_bad_row="skip") and where nothing is left.
    """

    def encode(row: dict[str, Any], report: Report) -> list[Encoded] | None:
        dialogue = read_dialogue(row)
        report.template = template_of(dialogue, template)
        example = encode_dialogue(dialogue, tokenizer, template)
        kept = truncate(example, max_len + 1, report)
        return [kept] if kept is not None else None

    key = ["instructions", tokenizer.hash, max_len, template_source(template, tokenizer), on_bad_row, held_out]
    return _cached(source, encode, on_bad_row, held_out, cache, key)


def load_preferences(
    source: str,
    tokenizer: Tokenizer,
    max_len: int,
    template: str = "auto",
    on_bad_row: str = "fail",
    held_out: float = 0.05,
    cache: Path | None = None,
) -> Examples:
    """Preference pairs of a source as sequences chosen, rejected, chosen, rejected, ..., each at most max_len + 1 ids.

    Only the last turn is counted. A pair's prompt is shortened the same way on both sides. See `load_instructions`.
    """

    def encode(row: dict[str, Any], report: Report) -> list[Encoded] | None:
        pair = read_preference(row)
        report.template = template_of(pair.chosen, template)
        chosen, rejected = (last_response(encode_dialogue(d, tokenizer, template)) for d in pair)
        return truncate_pair(chosen, rejected, max_len + 1, report)

    key = ["preferences", tokenizer.hash, max_len, template_source(template, tokenizer), on_bad_row, held_out]
    return _cached(source, encode, on_bad_row, held_out, cache, key)


def pack_examples(
    examples: Examples, row_len: int, group: int = 1, share: bool = False
) -> tuple[PackedRows, PackedRows | None]:
    """Both splits packed into rows of row_len slots (validation None where nothing was held out).

    group=2 for pairs: a row must then hold both answers with their prompts (2 max_len), and rows of 4 max_len waste least;
    with share=True each pair holds its prompt once.
    """
    validation = pack(examples.validation, row_len, group, share) if examples.validation else None
    return pack(examples.train, row_len, group, share), validation


def split_prompt(example: Encoded) -> int:
    """Where the last response starts."""
    uncounted = np.flatnonzero(~example.counted)
    return int(uncounted[-1]) + 1 if len(uncounted) else 0


def last_response(example: Encoded) -> Encoded:
    """The same ids with only the last response counted."""
    return Encoded(example.ids, np.arange(len(example.ids)) >= split_prompt(example))


def truncate(example: Encoded, limit: int, report: Report) -> Encoded | None:
    """At most `limit` ids: the oldest part of the prompt goes first, then the end of the response; None if nothing counts."""
    start = split_prompt(example)
    prompt, response = _budget(start, len(example.ids) - start, limit)
    report.prompts_truncated += prompt < start
    report.responses_truncated += start + response < len(example.ids)
    kept = slice(start - prompt, start + response)
    short = Encoded(example.ids[kept], example.counted[kept])
    if not short.counted[1:].any():
        report.dropped += 1
        return None
    return short


def truncate_pair(chosen: Encoded, rejected: Encoded, limit: int, report: Report) -> list[Encoded] | None:
    """Both sequences at most `limit` ids, with the same part of the prompt; None where the answers no longer differ."""
    start = split_prompt(chosen)
    longest = max(len(chosen.ids), len(rejected.ids)) - start
    prompt, response = _budget(start, longest, limit)
    kept = slice(start - prompt, start + response)
    pair = [Encoded(side.ids[kept], side.counted[kept]) for side in (chosen, rejected)]
    report.prompts_truncated += prompt < start
    report.responses_truncated += response < longest
    same = len(pair[0].ids) == len(pair[1].ids) and (pair[0].ids == pair[1].ids).all()
    if same or not all(side.counted[1:].any() for side in pair):
        report.dropped += 1
        return None
    return pair


def _budget(prompt: int, response: int, limit: int) -> tuple[int, int]:
    """How many ids of a prompt and a response are kept."""
    if prompt + response <= limit:
        return prompt, response
    least_prompt = min(prompt, max(1, int(limit * MIN_PROMPT_SHARE)))
    prompt = max(least_prompt, min(prompt, limit - response))
    return prompt, min(response, limit - prompt)


def _cached(source: str, encode: Encode, on_bad_row: str, held_out: float, cache: Path | None, key: list[Any]) -> Examples:
    """The examples from the cache where it has them, else read, encoded and kept there."""
    splits = open_rows(source)
    if cache is None:
        return _load(source, splits, encode, on_bad_row, held_out)
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, source, splits.fingerprint, key]).encode()).hexdigest()[:16]
    file = cache / f"examples-{digest}.npz"
    kept = _read_cache(file)
    if kept is not None:
        return kept
    examples = _load(source, splits, encode, on_bad_row, held_out)
    sequences = [*examples.train, *examples.validation]
    report = dataclasses.asdict(examples.report) | {"train_sequences": len(examples.train)}
    with files.whole_file(file) as stream:
        np.savez(
            stream,
            ids=np.concatenate([s.ids for s in sequences]),
            counted=np.concatenate([s.counted for s in sequences]),
            ends=np.cumsum([len(s.ids) for s in sequences]),
            report=np.frombuffer(json.dumps(report).encode(), np.uint8),
        )
    return examples


def _read_cache(file: Path) -> Examples | None:
    """The examples of a cache file; None where it is absent, damaged or not of this form: they are then made again."""
    try:
        with np.load(file, allow_pickle=False) as content:
            ids, counted, ends = (_array(content, name, kind) for name, kind in CACHE_ARRAYS.items())
            written = json.loads(content["report"].tobytes())
        report, n_train = parse(Report, written), parse(int, written.get("train_sequences"))
    except CACHE_ERRORS:
        return None
    if not len(ends) or ends[0] < 1 or (np.diff(ends) < 1).any() or not len(ids) == len(counted) == ends[-1]:
        return None
    starts = [0, *ends[:-1].tolist()]
    sequences = [Encoded(ids[start:end], counted[start:end]) for start, end in zip(starts, ends.tolist(), strict=True)]
    return Examples(sequences[:n_train], sequences[n_train:], report)


def _array(content: Mapping[str, np.ndarray], name: str, dtype: str) -> np.ndarray:
    array = content[name]
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{name}: {array.dtype} of shape {array.shape}, expected {dtype} of one dimension")
    return array


def _load(source: str, splits: Splits, encode: Encode, on_bad_row: str, held_out: float) -> Examples:
    report = Report(source, bad=BadRows(on_bad_row))
    parts: dict[str, list[Encoded]] = {"train": [], "validation": []}
    problems = 0
    for split, rows in splits.rows.items():
        for place, row in rows(report.bad):
            report.read += 1
            try:
                sequences = encode(row, report)
            except RowProblem as problem:
                problems += 1
                report.bad.report(place, str(problem))
                continue
            if sequences is None:
                continue
            report.kept += 1
            target = split
            if "validation" not in splits.rows and _is_held_out(sequences[0], held_out):
                target = "validation"
            parts[target] += sequences
    report.read += report.bad.count - problems  # rows that could not even be read
    if not parts["train"]:
        raise UserError(f"data source {source!r}: no example is left to train on ({report.line()})")
    return Examples(parts["train"], parts["validation"], report)


def _is_held_out(example: Encoded, share: float) -> bool:
    prompt = example.ids[: max(1, split_prompt(example))]
    return int.from_bytes(hashlib.blake2b(prompt.tobytes(), digest_size=8).digest(), "little") < share * 2**64


def open_rows(source: str) -> Splits:
    """The rows of each split of a source, each with its place, and what identifies the source."""
    if source == "python-functions":
        made = function_rows()
        return Splits(json.dumps(made), {split: partial(_made_rows, split, made[split]) for split in made})
    path = Path(source).expanduser()
    if path.exists():
        suffixes = (".jsonl", ".ndjson", ".json", ".parquet")
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes) if path.is_dir() else [path]
        unknown = [f for f in files if f.suffix.lower() not in suffixes]
        if not files or unknown:
            raise UserError(f"data source {source!r}: expected {', '.join(suffixes)} rows of instructions or preferences")
        if not sum(f.stat().st_size for f in files):
            raise UserError(f"data source {source!r}: {'all files are' if path.is_dir() else 'the file is'} empty")
        splits = {"train": files}
        for part in ("validation", "valid", "val", "dev", "test"):  # the first of these that is there; others are left out
            held = [f for f in files if _part(f, path) == part]
            if held and "validation" not in splits:
                splits["validation"] = held
            splits["train"] = [f for f in splits["train"] if f not in held]
        identity = [(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return Splits(json.dumps(identity), {split: partial(_file_rows, chosen) for split, chosen in splits.items()})
    if path.suffix in (".jsonl", ".json", ".parquet") or source.startswith((".", "/", "~")):
        raise UserError(f"data source {source!r}: no such file or folder")
    from fastlm.data.hub import open_hub_rows

    return Splits(*open_hub_rows(source, EXAMPLE_HUB_NAMES.get(source, source)))


def _made_rows(split: str, rows: list[dict[str, str]], bad: BadRows) -> Rows:
    yield from ((f"python-functions {split} row {number}", row) for number, row in enumerate(rows))


def _part(file: Path, root: Path) -> str:
    """The split a file's place names: train/x.jsonl and train.jsonl both say train."""
    parts = file.relative_to(root).parts
    return parts[0].split(".")[0] if parts else ""


def _file_rows(files: list[Path], bad: BadRows) -> Rows:
    for file in files:
        yield from read_parquet_rows(file, bad) if file.suffix.lower() == ".parquet" else read_json_rows(file, bad)

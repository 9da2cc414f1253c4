"""`fastlm data prepare` and `fastlm data inspect`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastlm import files
from fastlm.config import DataInspectConfig, DataPrepareConfig
from fastlm.data.catalogue import open_source
from fastlm.data.text.manifest import MANIFEST, SPLITS, Manifest, Settings, read_manifest
from fastlm.data.text.shards import write_folder
from fastlm.data.text.tokens import Tokens, open_data, open_tokens
from fastlm.errors import UserError, printable
from fastlm.tokenizer import Tokenizer, load_tokenizer

BAR_CHARS = 40


def prepare(cfg: DataPrepareConfig) -> int:
    """fastlm data prepare: each source into a folder, and how to train on them."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    settings = Settings(cfg.text_field, cfg.bad_rows, cfg.dedup)
    several = len(cfg.sources) > 1
    for name in cfg.sources:
        folder = Path(cfg.out) / Path(name).stem if several else Path(cfg.out)
        print(prepare_folder(name, tokenizer, folder, settings, cfg.workers or None))
    print("Train on it with:\n  fastlm pretrain --data " + _mixture(cfg.sources, cfg.out, several))
    return 0


def inspect(cfg: DataInspectConfig) -> int:
    """fastlm data inspect: what a prepared folder holds."""
    picture = Path(cfg.picture) if cfg.picture else None
    print(inspect_folder(Path(cfg.folder), cfg.documents, picture))
    return 0


def _mixture(sources: Sequence[str], out: str, several: bool) -> str:
    folders = [str(Path(out) / Path(name).stem) for name in sources]
    return '"' + ", ".join(folders) + '"' if several else out


def prepare_folder(
    name: str, tokenizer: Tokenizer, folder: Path, settings: Settings, workers: int | None = None
) -> str:
    """Tokenise a source into a folder, with a progress bar; what to tell the user about it.

    Raises UserError where the folder holds something else, and for all that
    `fastlm.data.text.shards.write_folder` refuses.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    source = open_source(name, "text", settings.text_field, settings.on_bad_row)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        wanted = (source.name, source.fingerprint, settings, tokenizer.hash)
        if wanted != (
            manifest.source,
            manifest.fingerprint,
            manifest.settings,
            manifest.tokenizer.hash,
        ):
            raise UserError(
                f"{folder}: holds other text ({printable(manifest.source)}), settings or "
                "tokenizer; name another folder"
            )
        open_data(folder, tokenizer)  # whole, and of this tokenizer
        return f"{name}: already prepared.\n{summary(manifest)}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds other files; name an empty or new folder")
    started = time.perf_counter()
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, TextColumn("{task.fields[tokens]:,} tokens"), transient=True) as bar:
        task = bar.add_task(name, total=source.size_bytes, tokens=0)
        write_folder(
            source,
            tokenizer,
            folder,
            lambda done, total, tokens: bar.update(
                task, completed=done, total=total, tokens=tokens
            ),
            settings,
            workers,
        )
    seconds = time.perf_counter() - started
    manifest = read_manifest(folder)
    megabytes = manifest.text_bytes / 1e6
    left_out = "\n  its test split is left out" if "test" in source.splits else ""
    rate = f"{megabytes:,.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)"
    return f"{name}: {rate}\n{summary(manifest)}{left_out}"


def summary(manifest: Manifest) -> str:
    """The counts of a prepared folder, a few lines."""
    lines = [
        f"  {split:<11}{entry.tokens:>15,} tokens {entry.documents:>12,} documents"
        for split, entry in manifest.splits.items()
    ]
    if manifest.bad_rows.count:
        lines.append(f"  {manifest.bad_rows.count:,} bad rows left out, among them:")
        lines += [f"    {printable(example)}" for example in manifest.bad_rows.examples]
    duplicates = manifest.duplicates
    if duplicates.exact or duplicates.near:
        lines.append(
            f"  {duplicates.exact:,} exact and {duplicates.near:,} near duplicates dropped"
        )
    return "\n".join(lines)


def inspect_folder(folder: Path, n_documents: int = 3, picture: Path | None = None) -> str:
    """What a prepared folder holds, after every hash was checked.

    Counts, lengths, and the first lines of n_documents of each split. picture: an .svg file to
    write the histogram of training document lengths to. Raises UserError for a damaged folder.
    """
    manifest = read_manifest(folder)
    made = manifest.tokenizer
    splits = {split: open_tokens(folder, split, verify=True) for split in SPLITS}
    bytes_per_token = manifest.text_bytes / max(
        1, sum(entry.tokens for entry in manifest.splits.values())
    )
    parts = [
        f"{folder}: {printable(manifest.source)} (revision {printable(manifest.fingerprint)}), "
        f"{manifest.text_bytes / 1e6:,.1f} MB",
        f"  tokenizer {printable(made.name)} ({printable(made.hash)}), "
        f"{made.vocab_size:,} ids as {manifest.dtype}, "
        f"{bytes_per_token:.2f} bytes per token",
        summary(manifest),
        "  every size and sha256 is as in the manifest",
    ]
    histogram = length_histogram(splits["train"])
    parts.append("\ntraining documents by length in tokens\n" + histogram_text(histogram))
    if picture is not None:
        files.write_text(
            picture, histogram_svg(histogram, f"{manifest.source}: documents by length")
        )
        parts.append(f"picture: {picture}")
    tokenizer = load_tokenizer(made.name)
    if tokenizer.hash != made.hash:
        raise UserError(
            f"{folder}: made by a tokenizer of hash {printable(made.hash)}, but "
            f"{printable(made.name)} is now {tokenizer.hash}; put the tokenizer back, or prepare "
            "the text again"
        )
    for split, tokens in splits.items():
        count = len(tokens.document_ends)
        for number in sorted(
            {n * count // max(1, n_documents) for n in range(n_documents)} & set(range(count))
        ):
            ids = tokens.document(number)
            text = tokenizer.decode(ids[:60])
            parts.append(f"\n{split} document {number:,} ({len(ids):,} tokens):\n  {text!r}")
    return "\n".join(parts)


def length_histogram(tokens: Tokens) -> list[tuple[int, int, int]]:
    """Document counts by length: (from, up to and including, how many), in powers of two."""
    lengths = np.diff(tokens.document_ends, prepend=0)
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    if not len(powers):
        return []
    counts = np.bincount(powers)
    first = int(powers.min())
    return [
        ((1 << p >> 1) + 1 if p else 1, 1 << p, int(counts[p])) for p in range(first, len(counts))
    ]


def histogram_text(histogram: list[tuple[int, int, int]]) -> str:
    """The histogram as bars of text."""
    most = max((count for _, _, count in histogram), default=1)
    return "\n".join(
        f"{low:>11,} - {high:<11,} {count:>11,} {'#' * -(-count * BAR_CHARS // most)}"
        for low, high, count in histogram
    )


def histogram_svg(histogram: list[tuple[int, int, int]], title: str) -> str:
    """The histogram as a picture that any browser shows."""
    from html import escape

    most = max((count for _, _, count in histogram), default=1)
    rows = []
    for n, (low, high, count) in enumerate(histogram):
        y = 40 + 24 * n
        width = 400 * count / most
        rows.append(f'<text x="130" y="{y + 14}" text-anchor="end">{low:,} - {high:,}</text>')
        rows.append(f'<rect x="140" y="{y}" width="{width:.1f}" height="18" fill="#4477aa"/>')
        rows.append(f'<text x="{146 + width:.1f}" y="{y + 14}">{count:,}</text>')
    height = 60 + 24 * len(histogram)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{height}" '
        'font-family="sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="white"/>'
        f'<text x="10" y="22" font-size="15">{escape(title)}</text>'
        f"{''.join(rows)}</svg>\n"
    )

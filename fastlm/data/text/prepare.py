"""Text to tokens, by name: from the cache where it holds them, else tokenised into it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from fastlm.data.catalogue import open_source
from fastlm.data.hub import HubOffline
from fastlm.data.source import Source
from fastlm.data.text.manifest import DEFAULTS, FORMAT, MANIFEST, Settings, read_manifest
from fastlm.data.text.mixture import Mixture, join_tokens, parse_mixture
from fastlm.data.text.shards import Progress, write_folder
from fastlm.data.text.tokens import ShuffledTokens, TokenData, open_data
from fastlm.errors import UserError
from fastlm.tokenizer import Tokenizer


def prepare(
    name: str,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None = None,
    settings: Settings = DEFAULTS,
    workers: int | None = None,
) -> TokenData:
    """Tokens of a source.

    name: a name for `open_source`, a folder that was prepared, or a mixture ("a:4, b:0.25": its
    train is a Mixture, its validation the documents of all its sources in a mixed order). cache:
    where tokens are kept, keyed by the source with its revision, the tokenizer's hash and the
    settings. progress(bytes of text done, bytes in all or None, tokens so far) is called after each
    batch. workers: threads that tokenise (None: one per core). Another process that prepares the
    same waits for the first. Without the network a name of the hub gives what the cache holds of
    it.

    Raises UserError for anything wrong with the source, for text that is too short, and where the
    disk refuses.
    """
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        return open_data(path, tokenizer)
    if not path.exists():
        sources = parse_mixture(name)
        if sources != [(name, 1.0)]:
            data = [
                prepare(source, tokenizer, cache, progress, settings, workers)
                for source, _ in sources
            ]
            return _mix(data, [epochs for _, epochs in sources], Path(cache))
    try:
        source = open_source(name, "text", settings.text_field, settings.on_bad_row)
    except HubOffline:
        kept = _prepared_before(name, tokenizer, Path(cache), settings)
        if kept is None:
            raise
        return open_data(kept, tokenizer)
    folder = cached_folder(source, tokenizer, Path(cache), settings)
    return write_folder(source, tokenizer, folder, progress, settings, workers)


def cached_folder(source: Source, tokenizer: Tokenizer, cache: Path, settings: Settings) -> Path:
    """Where the cache keeps the tokens of a source."""
    key = [FORMAT, source.name, source.fingerprint, tokenizer.hash, asdict(settings)]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    label = (
        re.sub(r"[^A-Za-z0-9.-]+", "-", Path(source.name).name or source.name).strip("-.") or "text"
    )
    return cache / f"{label}-{digest}"


def _mix(data: list[TokenData], epochs: list[float], cache: Path) -> TokenData:
    validation = join_tokens([source.validation for source in data], "mixture/validation")
    train = Mixture(tuple(source.train for source in data), tuple(epochs))
    return TokenData(cache, None, train, ShuffledTokens(validation, seed=0))


def _prepared_before(
    name: str, tokenizer: Tokenizer, cache: Path, settings: Settings
) -> Path | None:
    """The newest folder of the cache that was made of this, of whatever revision."""
    newest: tuple[float, Path] | None = None
    for file in cache.glob(f"*/{MANIFEST}"):
        if file.parent.name.startswith(".") or file.parent.suffix == ".partial":
            continue
        try:
            manifest = read_manifest(file.parent)
        except UserError:  # a damaged folder is no help here
            continue
        if (manifest.source, manifest.tokenizer.hash, manifest.settings) == (
            name,
            tokenizer.hash,
            settings,
        ):
            newest = max(newest or (0.0, file.parent), (file.stat().st_mtime, file.parent))
    return newest[1] if newest else None

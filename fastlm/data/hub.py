"""Text from the Hugging Face hub, streamed row by row through `datasets`."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from fastlm.data.records import BadRows
from fastlm.errors import UserError

CONNECT_SECONDS = 5


class HubOffline(UserError):
    """The hub does not answer; what was prepared before may serve."""


class HubName(NamedTuple):
    """Where a short name lives: repository, configuration, its split names (train, validation), column of text."""

    repository: str
    configuration: str | None
    splits: tuple[str, ...]
    text_field: str = "text"
    lines_are_rows: bool = False


HUB_NAMES = {
    "wikitext-2": HubName("Salesforce/wikitext", "wikitext-2-raw-v1", ("train", "validation"), lines_are_rows=True),
    "wikitext-103": HubName("Salesforce/wikitext", "wikitext-103-raw-v1", ("train", "validation"), lines_are_rows=True),
    "tinystories": HubName("roneneldan/TinyStories", None, ("train", "validation")),
    "wikipedia": HubName("wikimedia/wikipedia", "20231101.en", ("train",)),
}
# A level-one heading of WikiText (" = Title = ") opens an article; sections have more equals signs.
_TITLE = re.compile(r"^\s*= [^=].*[^=] =\s*$|^\s*= [^=\s] =\s*$")


def open_hub(name: str, text_field: str, bad: BadRows):
    """A hub data set as a Source: a known short name, "org/name" or "org/name:configuration".

    Raises UserError within seconds where the hub cannot be reached or has nothing of that name.
    """
    from fastlm.data.sources import Piece, Source

    repository, _, configuration = name.partition(":")
    known = HUB_NAMES.get(name, HubName(repository, configuration or None, (), text_field))
    require_hub(name)
    revision, splits = _look_up(name, known)

    def pieces(split: str) -> Iterator[Piece]:
        rows = load_hub_rows(name, known, splits[split], revision)
        if known.lines_are_rows:
            for article in join_articles(row[known.text_field] for row in rows):
                yield Piece(article, True)
            return
        for number, row in enumerate(rows):
            text = row.get(known.text_field)
            if isinstance(text, str) and text.strip():
                yield Piece(text, True)
            else:
                what = "empty" if isinstance(text, str) else f"{type(text).__name__}, expected text"
                bad.report(f"{name}, {split} row {number}", f"field {known.text_field!r} is {what}")

    return Source(name, f"{revision[:16]}", tuple(splits), pieces, None, bad)


def open_hub_rows(name: str, repository: str) -> tuple[str, dict[str, Callable[[BadRows], Iterator[tuple[str, dict]]]]]:
    """The revision of a hub data set, and by split ("train"; "validation" where it has one or a test split) its rows."""
    repository, _, configuration = repository.partition(":")
    known = HubName(repository, configuration or None, ())
    require_hub(name)
    revision, splits = _look_up(name, known)

    def rows(split: str, bad: BadRows) -> Iterator[tuple[str, dict]]:
        for number, row in enumerate(load_hub_rows(name, known, splits[split], revision)):
            yield f"{name}, {split} row {number}", row

    return revision, {split: partial(rows, split) for split in splits}


def require_hub(name: str) -> None:
    """Raise UserError, within seconds, where the hub does not answer."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    answered = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=CONNECT_SECONDS)
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except (OSError, ValueError):
            return
        answered.append(True)

    # A thread of its own, because name resolution has no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    if not constants.HF_HUB_OFFLINE:
        asking.start()
        asking.join(CONNECT_SECONDS + 1)
    if not answered:
        raise HubOffline(f"data source {name!r}: the Hugging Face hub does not answer (offline?); connect, or name a local "
                        ".txt, .jsonl or .parquet file, or python-stdlib, which every machine has")  # fmt: skip


def _look_up(name: str, known: HubName) -> tuple[str, dict[str, str]]:
    """The commit of the data set now, and our split names -> its split names."""
    import datasets
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(known.repository, timeout=30).sha or "main"
        found: list[str] = list(known.splits)
        if not found:
            found = datasets.get_dataset_split_names(known.repository, known.configuration, revision=revision)
    except network_errors() as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data source {name!r}: the hub has no such data set that can be read ({reason})") from error
    if "train" not in found:
        raise UserError(f"data source {name!r}: it has the splits {', '.join(found)}; expected one called train")
    validation = next((split for split in ("validation", "valid", "dev", "test") if split in found), None)
    return revision, {"train": "train"} | ({"validation": validation} if validation else {})


def network_errors() -> tuple[type[Exception], ...]:
    """What the hub's libraries raise when a data set cannot be had: each network library has a root of its own."""
    import datasets

    roots = {"httpx": "HTTPError", "aiohttp": "ClientError", "requests": "RequestException"}
    loaded = [getattr(sys.modules[module], name) for module, name in roots.items() if module in sys.modules]
    return (OSError, ValueError, datasets.exceptions.DatasetsError, *loaded)


def load_hub_rows(name: str, known: HubName, split: str, revision: str) -> Iterator[dict]:
    """Rows of one split, streamed; UserError where the connection breaks."""
    import datasets

    try:
        yield from datasets.load_dataset(known.repository, known.configuration, split=split, revision=revision, streaming=True)
    except network_errors() as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data source {name!r}: reading it failed ({reason}); run the same command again to go on "
                        "where it stopped") from error  # fmt: skip


def join_articles(lines: Iterator[str]) -> Iterator[str]:
    """WikiText has one row per line; an article is the lines from one level-one heading to the next, unchanged."""
    article: list[str] = []
    for line in lines:
        if _TITLE.match(line) and any(part.strip() for part in article):
            yield "".join(article)
            article = []
        article.append(line)
    if any(part.strip() for part in article):
        yield "".join(article)

"""Data sets of the Hugging Face hub, streamed record by record through `datasets`."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from fastlm.data.records import BadRecords, Record
from fastlm.data.source import Part, Source, split_named
from fastlm.errors import UserError

CONNECT_SECONDS = 5


class HubOffline(UserError):
    """The hub does not answer; what was prepared before may serve."""


class HubDataset(NamedTuple):
    """Where data lives on the hub.

    splits: the hub's names of them, where they are known (else the hub is asked). text_field: the
    column of text. one_line_each: a record is a line, and documents are the lines from one title to
    the next (as in WikiText).
    """

    repository: str
    configuration: str | None = None
    splits: tuple[str, ...] = ()
    text_field: str = "text"
    one_line_each: bool = False


# A level-one heading of WikiText (" = Title = ") opens an article; sections have more equals signs.
_TITLE = re.compile(r"^\s*= [^=].*[^=] =\s*$|^\s*= [^=\s] =\s*$")


def open_hub(name: str, bad: BadRecords, dataset: HubDataset) -> Source:
    """A data set as it is on the hub now.

    Raises UserError within seconds where the hub cannot be reached or has nothing of that name.
    """
    require_hub(name)
    revision, hub_splits = _look_up(name, dataset)
    splits: dict[str, list[Part]] = {}
    for hub_split in hub_splits:
        split = split_named(hub_split)
        if split != "train" or hub_split == "train":
            stream = partial(_records, name, dataset, hub_split, revision)
            splits.setdefault(split, []).append(Part(records=stream))
    return Source(name, _fingerprint(revision, hub_splits), splits, dataset.text_field, bad=bad)


def _fingerprint(revision: str, hub_splits: list[str]) -> str:
    """The revision; where older versions chose other validation data, what is chosen now too."""
    names = [split for split in hub_splits if split_named(split) == "validation"]
    older = [split for split in ("validation", "valid", "dev", "test") if split in hub_splits][:1]
    if names == older:
        return revision[:16]
    return f"{revision[:16]}, validation {'+'.join(names) or 'held out'}"


def _records(
    name: str, dataset: HubDataset, split: str, revision: str, bad: BadRecords
) -> Iterator[Record]:
    rows = _stream(name, dataset, split, revision)
    if dataset.one_line_each:
        articles = join_articles(row[dataset.text_field] for row in rows)
        for number, article in enumerate(articles):
            yield Record(f"{name}, {split} article {number}", {dataset.text_field: article})
        return
    for number, row in enumerate(rows):
        yield Record(f"{name}, {split} record {number}", row)


def require_hub(name: str) -> None:
    """Raise UserError, within seconds, where the hub does not answer."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=CONNECT_SECONDS)
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except (OSError, ValueError):
            return
        answered.set()

    # A thread of its own, because name resolution has no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    if not constants.HF_HUB_OFFLINE:
        asking.start()
        asking.join(CONNECT_SECONDS + 1)
    if not answered.is_set():
        raise HubOffline(
            f"data source {name!r}: the Hugging Face hub does not answer (offline?); connect, or "
            "name a local .txt, .jsonl or .parquet file, or python-stdlib, which every machine has"
        )


def _look_up(name: str, dataset: HubDataset) -> tuple[str, list[str]]:
    """The commit of the data set now, and the names of its splits."""
    import datasets
    from huggingface_hub import HfApi

    try:
        revision = HfApi().dataset_info(dataset.repository, timeout=30).sha or "main"
        splits = list(dataset.splits) or datasets.get_dataset_split_names(
            dataset.repository, dataset.configuration, revision=revision
        )
    except network_errors() as error:
        reason = _first_line(error)
        raise UserError(
            f"data source {name!r}: the hub has no such data set that can be read ({reason})"
        ) from error
    return revision, splits


def _stream(name: str, dataset: HubDataset, split: str, revision: str) -> Iterator[dict[str, Any]]:
    """Rows of one split, streamed; UserError where the connection breaks."""
    import datasets

    try:
        yield from datasets.load_dataset(
            dataset.repository,
            dataset.configuration,
            split=split,
            revision=revision,
            streaming=True,
        )
    except network_errors() as error:
        reason = _first_line(error)
        raise UserError(
            f"data source {name!r}: reading it failed ({reason}); run the same command again to go "
            "on where it stopped"
        ) from error


def network_errors() -> tuple[type[Exception], ...]:
    """What the hub's libraries raise; each network library has a root of its own."""
    import datasets

    roots = {"httpx": "HTTPError", "aiohttp": "ClientError", "requests": "RequestException"}
    loaded = [
        getattr(sys.modules[module], name)
        for module, name in roots.items()
        if module in sys.modules
    ]
    return (OSError, ValueError, datasets.exceptions.DatasetsError, *loaded)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def join_articles(lines: Iterator[str]) -> Iterator[str]:
    """Articles of WikiText, unchanged: the lines from one level-one heading to the next."""
    article: list[str] = []
    for line in lines:
        if _TITLE.match(line) and any(part.strip() for part in article):
            yield "".join(article)
            article = []
        article.append(line)
    if any(part.strip() for part in article):
        yield "".join(article)

"""Every data source by its name: the one table of names, and the one function that opens them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fastlm.data.functions import open_functions
from fastlm.data.hub import HubDataset, open_hub
from fastlm.data.local import RECORD_SUFFIXES, TEXT_SUFFIXES, open_local
from fastlm.data.records import BadRecords
from fastlm.data.source import Kind, Source
from fastlm.data.stdlib import open_stdlib
from fastlm.errors import UserError


class Entry(NamedTuple):
    """What a named source holds, what opens it: open(name, bad), and whether every machine has it.

    A name that every machine has is always that source; any other may also be the name of a file or
    folder here.
    """

    kind: Kind
    open: Callable[[str, BadRecords], Source]
    everywhere: bool = False


WIKITEXT = HubDataset(
    "Salesforce/wikitext", "wikitext-2-raw-v1", ("train", "validation", "test"), one_line_each=True
)

CATALOGUE = {
    "python-stdlib": Entry("text", open_stdlib, everywhere=True),
    "wikitext-2": Entry("text", partial(open_hub, dataset=WIKITEXT)),
    "wikitext-103": Entry(
        "text", partial(open_hub, dataset=WIKITEXT._replace(configuration="wikitext-103-raw-v1"))
    ),
    "tinystories": Entry(
        "text",
        partial(
            open_hub, dataset=HubDataset("roneneldan/TinyStories", None, ("train", "validation"))
        ),
    ),
    "wikipedia": Entry(
        "text",
        partial(open_hub, dataset=HubDataset("wikimedia/wikipedia", "20231101.en", ("train",))),
    ),
    "python-functions": Entry("examples", open_functions, everywhere=True),
    "alpaca": Entry("examples", partial(open_hub, dataset=HubDataset("tatsu-lab/alpaca"))),
    "hh-rlhf": Entry("examples", partial(open_hub, dataset=HubDataset("Anthropic/hh-rlhf"))),
}
_ON_THE_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?::(?P<configuration>[\w.-]+))?")


def open_source(
    name: str, kind: Kind = "text", text_field: str = "text", on_bad_row: str = "fail"
) -> Source:
    """Open a source by name.

    name: one of CATALOGUE, a local path, or org/name or org/name:configuration of the hub. kind:
    "text", or "examples" for instructions and preferences. text_field: the field of records that
    holds the text, where the source does not say it itself. on_bad_row: "fail" (the first bad
    record ends the run, naming file and line) or "skip" (bad records are left out, counted and
    listed). Raises UserError where nothing of that name exists, or it holds nothing, or something
    of the other kind.
    """
    bad = BadRecords(on_bad_row)
    known = [known for known, entry in CATALOGUE.items() if entry.kind == kind]
    expected = f"expected a path, {', '.join(known)}, or org/name of the hub"
    if not name.strip():
        raise UserError(f"data source: got an empty name; {expected}")
    entry = CATALOGUE.get(name)
    path = Path(name).expanduser()
    if path.exists() and not (entry and entry.everywhere):
        return open_local(name, path, kind, text_field, bad)
    if entry:
        if entry.kind != kind:
            raise UserError(f"data source {name!r}: it holds {entry.kind}, not {kind}; {expected}")
        return entry.open(name, bad)
    repository = _ON_THE_HUB.fullmatch(name)
    if (
        repository
        and not name.startswith(".")
        and path.suffix not in TEXT_SUFFIXES + RECORD_SUFFIXES
    ):
        return open_hub(
            name,
            bad,
            HubDataset(repository["repository"], repository["configuration"], (), text_field),
        )
    raise UserError(f"data source {name!r}: no such file or folder; {expected}")

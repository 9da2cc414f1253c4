"""python-functions: instructions and preferences made from the standard library.

Each function with a docstring and a body of some lines gives one record:

    prompt       "Complete this function." and its source up to the end of the docstring
    completion   the true body (also `chosen`)
    rejected     in turn: the body of another function; the true body with its lines reversed

Functions of the files that python-stdlib holds out are the validation split, so a model pretrained
on it has not seen them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from fastlm.data.records import BadRecords, Record
from fastlm.data.source import Part, Source
from fastlm.data.stdlib import stdlib_files, stdlib_held_out

MOST_CHARACTERS = 700  # of a whole function
LEAST_CHARACTERS = 40  # of a body


class Function(NamedTuple):
    """The source of one function, cut after its docstring; both parts end with a line end."""

    head: str
    body: str


def open_functions(name: str, bad: BadRecords) -> Source:
    """The records of each split, in the order of file and line."""
    made = function_records()

    def records(split: str, bad: BadRecords) -> Iterator[Record]:
        for number, fields in enumerate(made[split]):
            yield Record(f"{name} {split} record {number}", fields)

    fingerprint = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
    return Source(
        name,
        fingerprint,
        {split: [Part(records=partial(records, split))] for split in made},
        bad=bad,
    )


def function_records() -> dict[str, list[dict[str, str]]]:
    """The fields of each record of each split."""
    return {split: make_records(functions) for split, functions in stdlib_functions().items()}


@cache
def stdlib_functions() -> dict[str, list[Function]]:
    """The functions of each split, each body once."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = {
        name: path.read_text("utf-8", errors="replace") for name, path in stdlib_files(root).items()
    }
    held_out = stdlib_held_out(texts)
    functions: dict[str, list[Function]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for name, text in texts.items():
        for function in cut_functions(text):
            if function.body not in seen:
                seen.add(function.body)
                functions["validation" if name in held_out else "train"].append(function)
    return functions


def cut_functions(text: str) -> Iterator[Function]:
    """The functions of a file that have a docstring, a body after it, and no function inside."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if (
            not isinstance(node, ast.FunctionDef)
            or len(node.body) < 2
            or ast.get_docstring(node) is None
        ):
            continue
        head_end = node.body[0].end_lineno
        assert head_end is not None
        source = lines[node.lineno - 1 : node.end_lineno]
        indent = len(source[0]) - len(source[0].lstrip())
        source = [line[indent:] if line[:indent].strip() == "" else line for line in source]
        head = "".join(source[: head_end - node.lineno + 1])
        body = "".join(source[head_end - node.lineno + 1 :])
        fits = (
            len(head) + len(body) <= MOST_CHARACTERS
            and len(body) >= LEAST_CHARACTERS
            and body.endswith("\n")
        )
        if fits and "def " not in body and "class " not in body:
            yield Function(head, body)


def make_records(functions: list[Function]) -> list[dict[str, str]]:
    """A record of each function whose rejected answer differs from the true one."""
    records = []
    for number, (head, body) in enumerate(functions):
        other = functions[number_of(head, len(functions))].body
        rejected = (mutate(body) if number % 2 else "") or other
        if rejected != body:
            prompt = f"Complete this function.\n\n{head}"
            records.append(
                {"prompt": prompt, "completion": body, "chosen": body, "rejected": rejected}
            )
    return records


def mutate(body: str) -> str:
    """The body with its lines in the opposite order; empty where that changes nothing."""
    reversed_body = "".join(reversed(body.splitlines(keepends=True)))
    return reversed_body if reversed_body != body else ""


def number_of(text: str, below: int) -> int:
    """A number below `below` that follows from the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") % below

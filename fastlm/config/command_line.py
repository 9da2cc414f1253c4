"""From the command line to a configuration. Every mistake names the nearest valid word."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from fastlm.config.toml import KINDS, TEXTS, coerce, field_types, load_recipe, load_run, override
from fastlm.errors import UserError, check, nearest

# What may change when a run is resumed: how long it is, where it runs and what it records.
RESUMABLE = (
    "--resume",
    "--steps",
    "--device",
    "--parallel",
    "--reshard-after-forward",
    "--timeout-minutes",
    "--cache",
    "--tensorboard",
    "--validate-every",
    "--checkpoint-every",
    "--keep-checkpoints",
)

T = TypeVar("T")


def parse(cls: type[T], argv: Sequence[str], argument: str = "", rest: str = "") -> T:
    """A configuration: the recipe (or the run to resume), then the preset, then single options.

    argument: the field that words without dashes set, with dots behind it where there may be
    several. rest: the field that takes all words after the first, where that is such a word; there
    are no options then.
    """
    if rest:
        given = bool(argv) and not argv[0].startswith("-")
        return override(cls(), {argument: argv[0], rest: argv[1:]} if given else {})
    asked = read_words(cls, argv, argument)
    if "--resume" in asked:
        base = load_run(cls, asked["--resume"])
        for flag in asked:
            allowed = f"only {', '.join(RESUMABLE[1:])} can"
            check(flag in RESUMABLE, f"{flag} cannot change when a run is resumed; {allowed}")
    else:
        recipe = asked.get("--recipe", getattr(cls(), "recipe", ""))
        base = load_recipe(cls, recipe) if recipe else cls()
    values: dict[str, Any] = {}
    for flag, value in asked.items():
        *tables, name = flag.removeprefix("--").replace("-", "_").split(".")
        place = values
        for table in tables:
            place = place.setdefault(table, {})
        place[name] = value
    return override(base, values)


def flags(cls: type, prefix: str = "--") -> dict[str, Any]:
    """Every option of a configuration, with the type of its field."""
    types: dict[str, Any] = {}
    for name, kind in field_types(cls).items():
        if dataclasses.is_dataclass(kind):
            types |= flags(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            types[f"{prefix}{name}".replace("_", "-")] = kind
    return types


def negative(flag: str) -> str:
    """The option that switches another one off: --no-compile, --no-model.tie-embeddings."""
    return flag.replace("--", "--no-", 1)


def expected(kind: Any) -> str:
    """What an option's value must be, in words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(filter(None, typing.get_args(kind)))}"
    return KINDS[str if kind == TEXTS else kind]


def read_words(cls: type, argv: Sequence[str], argument: str) -> dict[str, Any]:
    """The options that the words set, with their values."""
    known = flags(cls)
    off = {negative(flag): flag for flag, kind in known.items() if kind is bool}
    values: dict[str, Any] = {}
    arguments: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            check_argument(word, arguments, argument, known)
            arguments.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in off or known.get(flag) is bool:
            positive = off.get(flag, flag)
            check(
                not equals,
                f"{word}: {positive} takes no value; write {positive} or {negative(positive)}",
            )
            values[positive] = flag == positive
            continue
        if flag not in known:
            turned = negative(flag.replace(".no-", ".", 1))  # --model.no-x for --no-model.x
            wanted = turned if turned in off else flag
            instead = nearest(wanted, [*known, *off], "see --help")
            raise UserError(f"unknown option {flag}; {instead}")
        kind = known[flag]
        if not equals:
            check(bool(words), f"{flag} needs a value: {expected(kind)}")
            value = words.pop(0)
            option = value.partition("=")[0].replace("_", "-")
            check(
                option not in known and option not in off,
                f"{flag} needs a value: {expected(kind)}; "
                f"{option} is an option, so write {flag}={value} if it is meant",
            )
        given = coerce(flag, kind, value)
        values[flag] = values.get(flag, ()) + given if kind == TEXTS else given
    if arguments:
        flag = f"--{argument.rstrip('.')}".replace("_", "-")
        check(flag not in values, f"{flag} is given twice, and as {arguments[0]!r}; give it once")
        values[flag] = tuple(arguments) if known[flag] == TEXTS else ",".join(arguments)
    return values


def check_argument(word: str, before: list[str], argument: str, known: dict[str, Any]) -> None:
    """Raise UserError for a word that neither is an option nor may stand for `argument`."""
    if word.startswith("-") or not argument:
        way = "options are written --name value (see --help)" if known else "it takes no arguments"
        raise UserError(f"unexpected argument {word!r}; {way}")
    if before and not argument.endswith("..."):
        only = f"the {argument} is {before[0]!r} already, and there is only one"
        raise UserError(f"unexpected argument {word!r}; {only}")

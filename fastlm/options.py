"""From TOML recipes and the command line to a configuration; every mistake names the nearest valid word. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import tomllib
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastlm.config import PRESETS, ModelConfig, check
from fastlm.errors import UserError

TEXTS = tuple[str, ...]  # an option that may be given several times

RECIPES = Path(__file__).parent / "train" / "recipes"

T = TypeVar("T")


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error message: the choice most like word, or all of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose among {', '.join(choices)}"


def preset(name: str) -> ModelConfig:
    check(name in PRESETS, f"unknown preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def coerce(key: str, kind: Any, value: Any) -> Any:
    """value as kind (int, float, bool, str, tuple[str, ...] or a Literal of strings), from TOML or a command-line word."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        check(value in choices, f"{key} is {value!r}; {nearest(str(value), choices)}")
        return value
    if kind == TEXTS:
        value = [value] if isinstance(value, str) else value
        texts = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        check(texts, f"{key} is {value!r}; it must be texts")
        return tuple(value)
    if isinstance(value, str) and kind in (int, float):
        try:
            value = kind(value.replace("_", ""))
        except ValueError:
            raise UserError(f"{key} is {value!r}; it must be {'an integer' if kind is int else 'a number'}") from None
    if kind is float and type(value) is int:
        value = float(value)
    check(not isinstance(value, float) or math.isfinite(value), f"{key} is {value}; it must be finite")
    check(type(value) is kind, f"{key} is {value!r}; it must be a value of type {kind.__name__}")
    return value


def override(config: T, values: dict[str, Any], where: str, prefix: str = "") -> T:
    """config with the (nested) values put in; a preset replaces the model. An unknown key or a wrong type raises UserError."""
    types, changes = field_types(type(config)), {}
    start = {"model": preset(values["preset"])} if "preset" in values else {}
    values = {name: {} for name in start} | values
    for name, value in values.items():
        key = f"{prefix}{name}"
        check(name in types, f"{where}: unknown key {key!r}; {nearest(name, types)}")
        if dataclasses.is_dataclass(types[name]):
            check(isinstance(value, dict), f"{where}: {key} is {value!r}; it must be a table: [{key}]")
            base = load_recipe(types[name], value["recipe"]) if value.get("recipe") else getattr(config, name)
            changes[name] = override(start.get(name, base), value, where, f"{key}.")
        else:
            changes[name] = coerce(key, types[name], value)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def load_recipe(cls: type[T], name: str) -> T:
    """The configuration of a shipped recipe (by name) or of a TOML file (by path)."""
    folder = RECIPES / cls.__name__.removesuffix("Config").lower()
    path = Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    shipped = [p.stem for p in folder.glob("*.toml")]
    check(path.is_file(), f"unknown recipe {name!r}; {nearest(name, shipped)} (or give the path of a .toml file)")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a TOML file: {e}") from None
    return override(cls(), {"recipe": path.stem} | values, str(path))


def flags(cls: type, prefix: str = "--") -> dict[str, Any]:
    """Every command-line flag of a configuration, with its type."""
    found: dict[str, Any] = {}
    for name, kind in field_types(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= flags(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}".replace("_", "-")] = kind
    return found


def given(cls: type, argv: Sequence[str]) -> dict[str, Any]:
    """The flags set on the command line, with their values; a word that cannot be understood raises UserError."""
    known, values, words = flags(cls), {}, list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        flag = flag.replace("_", "-")
        check(flag.startswith("--"), f"unexpected argument {flag!r}; options are written --name value (see --help)")
        positive = flag.replace("--no-", "--", 1) if known.get(flag.replace("--no-", "--", 1)) is bool else flag
        check(positive in known, f"unknown option {flag}; {nearest(flag, known)}")
        if known[positive] is bool:
            values[positive] = flag == positive
            continue
        if not equals:
            check(bool(words), f"{flag} needs a value")
            value = words.pop(0)
        more = coerce(flag, known[positive], value)
        values[positive] = values.get(positive, ()) + more if known[positive] == TEXTS else more
    return values


# What may change when a run goes on: how long it is, where it runs and what it records.
RESUMABLE = (
    "--resume", "--steps", "--device", "--cache", "--tensorboard", "--validate-every", "--checkpoint-every",
    "--keep-checkpoints",
)  # fmt: skip


def load_run(cls: type[T], run: str) -> T:
    """The configuration saved in a run folder."""
    path = Path(run) / "config.toml"
    check(path.is_file(), f"{run} is not a run folder: it holds no config.toml; give the folder that --out named")
    return load_recipe(cls, str(path))


def parse(cls: type[T], argv: Sequence[str], prog: str, positional: str = "") -> T:
    """Configuration from the command line: the recipe (or the run to resume), then the preset, then single flags.

    positional: the field that the first words without dashes set, joined by commas. Prints the help and exits on --help.
    """
    recipe = getattr(cls(), "recipe", "")
    if {"-h", "--help"} & set(argv):
        import tyro

        tyro.cli(cls, prog=prog, args=["--help"], default=load_recipe(cls, recipe) if recipe else cls())
    if positional and argv and not argv[0].startswith("-"):
        words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
        argv = [f"--{positional}", ",".join(words), *argv[len(words) :]]
    asked = given(cls, argv)
    if "--resume" in asked:
        base = load_run(cls, asked["--resume"])
        for flag in asked:
            check(flag in RESUMABLE, f"{flag} cannot change when a run is resumed; only {', '.join(RESUMABLE[1:])} can")
    else:
        recipe = asked.get("--recipe", recipe)
        base = load_recipe(cls, recipe) if recipe else cls()
    values: dict[str, Any] = {}
    for flag, value in asked.items():
        *tables, name = flag.removeprefix("--").replace("-", "_").split(".")
        place = values
        for table in tables:
            place = place.setdefault(table, {})
        place[name] = value
    return override(base, values, prog)


def to_toml(config: Any) -> str:
    """The configuration as TOML: plain values first, then one table for each nested dataclass."""

    def lines(c: Any) -> list[str]:
        plain = {n: getattr(c, n) for n, k in field_types(type(c)).items() if not dataclasses.is_dataclass(k)}
        return [f"{name} = {json.dumps(value)}" for name, value in plain.items()]

    out = lines(config)
    for name, kind in field_types(type(config)).items():
        if dataclasses.is_dataclass(kind):
            out += ["", f"[{name}]", *lines(getattr(config, name))]
    return "\n".join(out) + "\n"

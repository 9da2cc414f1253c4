"""From TOML to a configuration and back; every mistake names the nearest valid word."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastlm.config.model import PRESETS, ModelConfig
from fastlm.errors import UserError, check, nearest

RECIPES = Path(__file__).parents[1] / "train" / "recipes"
TEXTS = tuple[str, ...]  # a list in TOML; on the command line an option that may be repeated
KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}

T = TypeVar("T")


def field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def coerce(key: str, kind: Any, value: Any) -> Any:
    """A value from TOML, or a word of the command line, as what its field holds.

    kind: int, float, bool, str, tuple[str, ...] or a Literal of strings.
    """
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        check(value in choices, f"{key} is {value!r}; {nearest(str(value), filter(None, choices))}")
        return value
    if kind == TEXTS:
        texts = [value] if isinstance(value, str) else value
        good = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
        check(good, f"{key} is {value!r}; it must be a text or a list of texts")
        return tuple(texts)
    if isinstance(value, str) and kind in (int, float):
        try:
            value = kind(value.replace("_", ""))
        except ValueError:
            raise UserError(f"{key} is {value!r}; it must be {KINDS[kind]}") from None
    if kind is float and type(value) is int:
        value = float(value)
    check(type(value) is kind, f"{key} is {value!r}; it must be {KINDS[kind]}")
    small = not isinstance(value, int) or abs(value) < 2**63
    check(small, f"{key} is {value}; it must lie between -2^63 and 2^63")
    finite = not isinstance(value, float) or math.isfinite(value)
    check(finite, f"{key} is {value}; it must be finite")
    return value


def preset(name: str) -> ModelConfig:
    check(name in PRESETS, f"unknown preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def override(config: T, values: dict[str, Any], where: str = "") -> T:
    """The configuration with the values put in, which are nested as in TOML.

    A preset replaces the model, and the recipe of a table that table, before its other values are
    put in. An unknown key or a wrong value raises UserError; its message begins with `where`.
    """
    try:
        return _override(config, values, "")
    except UserError as e:
        raise UserError(f"{where}: {e}" if where else str(e)) from None


def _override(config: T, values: dict[str, Any], prefix: str) -> T:
    types = field_types(type(config))
    changes: dict[str, Any] = {}
    for name in values:
        check(name in types, f"unknown key {f'{prefix}{name}'!r}; {known_key(name, types)}")
    if "preset" in values:
        changes["model"] = preset(coerce(f"{prefix}preset", str, values["preset"]))
    for name, value in values.items():
        key = f"{prefix}{name}"
        if not dataclasses.is_dataclass(types[name]):
            changes[name] = coerce(key, types[name], value)
            continue
        check(isinstance(value, dict), f"{key} is {value!r}; it must be a table: [{key}]")
        base = changes.get(name, getattr(config, name))
        if value.get("recipe") and hasattr(base, "recipe"):
            base = load_recipe(type(base), coerce(f"{key}.recipe", str, value["recipe"]))
        changes[name] = _override(base, value, f"{key}.")
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except UserError as error:
        raise UserError(with_tables(str(error), prefix, types)) from None


def known_key(name: str, types: dict[str, Any]) -> str:
    """The end of a message on an unknown key: where a key of that name is, or the nearest one."""
    tables = [table for table, kind in types.items() if dataclasses.is_dataclass(kind)]
    inside = [f"{table}.{name}" for table in tables if name in field_types(types[table])]
    return f"did you mean {' or '.join(inside)}?" if inside else nearest(name, types)


def with_tables(message: str, prefix: str, types: dict[str, Any]) -> str:
    """A message that begins with a field of a configuration, or with its table and field, with all
    tables that the field lies in: "optim.lr is 0" with "dpo.optim." is "dpo.optim.lr is 0"."""
    table, _, field = message.split(" ")[0].rpartition(".")
    if field not in types or not prefix.endswith(f"{table}."):
        return message
    return f"{prefix}{message[len(table) + bool(table) :]}"


def shipped_recipes(cls: type) -> list[Path]:
    """The recipes that come with fastlm for this configuration."""
    return sorted((RECIPES / cls.__name__.removesuffix("Config").lower()).glob("*.toml"))


def load_recipe(cls: type[T], name: str) -> T:
    """The configuration of a shipped recipe (by name) or of a TOML file (by path)."""
    shipped = {path.stem: path for path in shipped_recipes(cls)}
    path = Path(name) if name.endswith(".toml") else shipped.get(name)
    if path is None:
        words = f"{nearest(name, shipped)} (or give the path of a .toml file)"
        raise UserError(f"unknown recipe {name!r}; {words}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        words = f"give a .toml file, or a shipped recipe: {', '.join(shipped)}"
        raise UserError(f"could not read {path}: {e.strerror}; {words}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a TOML file: {e}") from None
    return override(cls(), {"recipe": path.stem} | values, str(path))


def load_run(cls: type[T], run: str) -> T:
    """The configuration saved in a run folder."""
    path = Path(run) / "config.toml"
    expected = "it holds no config.toml; give the folder that --out named"
    check(path.is_file(), f"{run} is not a run folder: {expected}")
    return load_recipe(cls, str(path))


def to_toml(config: Any) -> str:
    """The configuration as TOML: plain values first, then one table for each nested dataclass."""

    def lines(c: Any) -> list[str]:
        plain = [
            n for n, kind in field_types(type(c)).items() if not dataclasses.is_dataclass(kind)
        ]
        return [f"{name} = {json.dumps(getattr(c, name))}" for name in plain]

    out = lines(config)
    for name, kind in field_types(type(config)).items():
        if dataclasses.is_dataclass(kind):
            out += ["", f"[{name}]", *lines(getattr(config, name))]
    return "\n".join(out) + "\n"


def is_same(config: Any, written: str) -> bool:
    """Whether the configuration is the one that was written as TOML.

    The text may be older than some fields, which then must have their defaults.
    """
    wanted = tomllib.loads(to_toml(type(config)()))
    try:
        saved = tomllib.loads(written)
    except tomllib.TOMLDecodeError:
        return False
    for name, value in saved.items():
        wanted[name] = wanted.get(name, {}) | value if isinstance(value, dict) else value
    return wanted == tomllib.loads(to_toml(config))

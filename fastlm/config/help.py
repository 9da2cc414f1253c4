"""The help of a command: every option with its meaning and unit, its choices and its default."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from fastlm.config.command_line import negative
from fastlm.config.model import PRESETS
from fastlm.config.toml import TEXTS, field_types, load_recipe, shipped_recipes

NARROWEST = 60  # characters of a line
WIDEST = 100
COLUMN = 30  # characters before an option's meaning
WORDS = {int: "INT", float: "NUMBER", str: "TEXT", TEXTS: "TEXT", bool: ""}


class Option(NamedTuple):
    flag: str
    kind: Any
    default: Any
    meaning: str


def page(cls: type, name: str, argument: str = "", rest: str = "", example: str = "") -> str:
    """The help of a command, as wide as the terminal; argument and rest as parse() takes them."""
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    recipe = getattr(cls(), "recipe", "")
    config = load_recipe(cls, recipe) if recipe else cls()
    grouped = [] if rest else list(groups(config))
    usage = [f"fastlm {name}", argument.upper(), rest.upper(), "[options]" if grouped else ""]
    parts = [wrapped(f"usage: {' '.join(filter(None, usage))}", width), described(cls, width)]
    if example:
        parts.append(wrapped(f"for example: {example}", width))
    for field in filter(None, (argument.rstrip("."), rest)):
        parts.append(wrapped(f"{field.upper()}: {meanings(cls)[field]}", width))
    for title, options in grouped:
        parts.append("\n".join([wrapped(title, width), *(lines(o, width) for o in options)]))
    if recipe:
        parts.append(f"The defaults shown are those of the recipe {recipe}.")
    parts += named(cls, width)
    return "\n\n".join(parts) + "\n"


def groups(config: Any, prefix: str = "--") -> Iterator[tuple[str, list[Option]]]:
    """The options by the class or the table that they belong to, each with its title."""
    cls = type(config)
    types = field_types(cls)
    shared = f"{prefix}*: " if prefix != "--" else ""
    written: set[str] = set()
    for base in cls.__mro__:
        options = []
        for name in inspect.get_annotations(base):
            if name in types and name not in written and not dataclasses.is_dataclass(types[name]):
                flag = f"{prefix}{name}".replace("_", "-")
                meaning = meanings(cls)[name]
                options.append(Option(flag, types[name], getattr(config, name), meaning))
                written.add(name)
        if options:
            own = "Options" if base is cls and not shared else first_line(base)
            yield f"{shared}{own}", options
    for name, kind in types.items():
        if dataclasses.is_dataclass(kind):
            yield from groups(getattr(config, name), f"{prefix}{name}.")


def lines(option: Option, width: int) -> str:
    """An option and what it means, in two columns."""
    name = f"  {option.flag} {placeholder(option.kind)}"
    if option.kind is bool:
        name = f"  {option.flag}, {negative(option.flag)}"
    default = shown(option.default)
    text = f"{option.meaning} [default: {default}]" if default else option.meaning
    body = textwrap.wrap(text, width - COLUMN, break_on_hyphens=False)
    indented = [" " * COLUMN + line for line in body]
    if len(name) < COLUMN - 1:
        return "\n".join([name.ljust(COLUMN) + body[0], *indented[1:]])
    return "\n".join([name, *indented])


def placeholder(kind: Any) -> str:
    """What stands for the value of an option."""
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(filter(None, typing.get_args(kind))) + "}"
    return WORDS[kind]


def shown(default: Any) -> str:
    """A default as it would be written on the command line; nothing where it is empty."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(json.dumps(text) for text in default)
    return f"{default:_}" if isinstance(default, int) else str(default)


def named(cls: type, width: int) -> Iterator[str]:
    """The presets and the shipped recipes, where the command takes them."""
    if "preset" in field_types(cls):
        shapes = {
            name: f"{c.n_layers} layers of {c.dim} channels, {c.n_heads} heads, "
            f"{c.max_seq_len:_} tokens at a time"
            for name, c in PRESETS.items()
        }
        yield table("Presets (--preset)", shapes, width)
    if "recipe" in field_types(cls):
        recipes = {
            path.stem: recipe_comment(path.read_text("utf-8")) for path in shipped_recipes(cls)
        }
        yield table("Recipes (--recipe)", recipes, width)


def table(title: str, rows: dict[str, str], width: int) -> str:
    column = max(map(len, rows)) + 4
    out = [title]
    for name, text in rows.items():
        body = textwrap.wrap(text, width - column, break_on_hyphens=False)
        out.append(f"  {name}".ljust(column) + body[0])
        out += [" " * column + line for line in body[1:]]
    return "\n".join(out)


def recipe_comment(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.removeprefix("# ") for line in comment).partition(". ")[0].rstrip(".")


def described(cls: type, width: int) -> str:
    paragraphs = inspect.getdoc(cls).split("\n\n")  # type: ignore[union-attr]
    return "\n\n".join(wrapped(paragraph, width) for paragraph in paragraphs)


def first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False))


def meanings(cls: type) -> dict[str, str]:
    """What each field of a configuration means: the string that stands below it in the source."""
    strings: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        strings |= strings_below(base.__module__)[base.__name__]
    return strings


@functools.cache
def strings_below(module: str) -> dict[str, dict[str, str]]:
    """By class and field: the string that follows the field, which Python itself throws away."""
    classes: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            classes[node.name] = {}
            for field, below in zip(node.body, node.body[1:], strict=False):
                match field, below:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        classes[node.name][name] = " ".join(text.split()).rstrip(".")
    return classes

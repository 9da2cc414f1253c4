"""The help of every command: each option, what it means, and a default that the parser takes."""

from __future__ import annotations

import json
import re

import pytest

from fastlm import config
from fastlm.cli import COMMANDS, configuration, help_page
from fastlm.config.command_line import flags, negative
from fastlm.config.help import Option, groups, meanings, shown
from fastlm.config.toml import RECIPES, TEXTS, field_types
from fastlm.errors import UserError

NAMES = [name for name, command in COMMANDS.items() if not command.rest]


def config_class(name: str) -> type:
    return getattr(config, COMMANDS[name].config)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_wider_than_the_terminal(name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert max(map(len, help_page(name).splitlines())) <= width


@pytest.mark.parametrize("name", NAMES)
def test_help_has_exactly_the_options_that_the_parser_knows(name):
    known = flags(config_class(name))
    switched_off = {negative(flag) for flag, kind in known.items() if kind is bool}
    page = re.findall(r"^  (--[^\s,]+)(?:, (--\S+))?", help_page(name), flags=re.MULTILINE)
    assert {flag for pair in page for flag in pair if flag} == {*known, *switched_off}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_means(name):
    text = " ".join(help_page(name).split())
    for _, options in groups(config_class(name)()):
        for option in options:
            assert len(option.meaning.split()) > 1, option.flag
            assert option.meaning in text
    assert meanings(config_class(name)).keys() <= field_types(config_class(name)).keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_shown_are_what_the_command_takes_without_options(name):
    command = COMMANDS[name]
    words = [word for field in command.required for word in (f"--{field}", "x")]
    plain = configuration(name, words)
    shown_words = [
        word
        for _, options in groups(plain)
        for option in options
        if option.flag not in words and not option.flag.endswith(("recipe", "preset"))
        for word in as_words(option)
    ]
    assert configuration(name, [*words, *shown_words]) == plain


def as_words(option: Option) -> list[str]:
    """The words that give an option the default that its help shows."""
    default = shown(option.default)
    if option.kind is bool:
        return [option.flag if default == "on" else negative(option.flag)]
    values = json.loads(f"[{default}]") if option.kind == TEXTS else [default] if default else []
    return [f"{option.flag}={value}" for value in values]


def test_choices_presets_recipes_and_units_are_there():
    page = help_page("pretrain")
    assert "--optim.schedule {wsd,cosine,linear}" in page
    assert "--seq-len INT" in page
    assert "Tokens per row [default: 256]" in page
    for name in config.PRESETS:
        assert f"\n  {name}  " in page
    for stage in ("pretrain", "sft", "dpo", "pipeline"):
        for recipe in (RECIPES / stage).glob("*.toml"):
            assert f"\n  {recipe.stem}  " in help_page(stage)


def test_a_switch_is_written_the_same_way_in_help_and_parser():
    page = help_page("pretrain")
    for written in re.findall(r"--no-\S+", page):
        assert configuration("pretrain", [written])
    with pytest.raises(UserError, match="did you mean --no-model.tie-embeddings"):
        configuration("pretrain", ["--model.no-tie-embeddings"])


def test_help_says_how_a_command_is_called():
    assert help_page("eval").startswith("usage: fastlm eval MODELS... [options]\n")
    assert help_page("lm-eval").startswith("usage: fastlm lm-eval MODEL ARGUMENTS\n")
    assert help_page("doctor").startswith("usage: fastlm doctor\n")

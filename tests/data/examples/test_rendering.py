"""A stranger's chat template renders as in this process, or ends in one line: never in a hang."""

from __future__ import annotations

import os

import pytest

from fastlm.data.examples.formats import Message
from fastlm.data.examples.rendering import renderer
from fastlm.data.examples.templates import TEMPLATES, has_own_template
from fastlm.errors import UserError
from fastlm.tokenizer import load_tokenizer

TURNS = [Message("system", "Be brief.", ""), Message("user", "lone \ud800 \u2028 ☃", "more")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_process_of_its_own_renders_what_this_one_does(name):
    source = TEMPLATES[name]
    apart = renderer(source)
    here = renderer(source, trusted=True)
    for opened in (True, False):
        text = apart(TURNS, opened, "<eos>", "<end>")
        assert text == here(TURNS, opened, "<eos>", "<end>")
        assert TURNS[1].content in text


HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "than 2 s",
    "{{ 9 ** n ** 9 }}{% set n = 9 %}": "cannot render",
    "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}": "more than 2 s",
    "{{ range(10 ** 9) | length }}": "Range too big",
    "{{ 'x' * (messages | length * 10 ** 10) }}": "more than 400 MiB",
    "{{ ['x' * 30000000] | join }}{{ messages }}": "20,000,000 characters",
    "{{ '%999999999d' % (messages | length) }}": "more than 400 MiB",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "not valid Jinja (maximum recursion",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "maximum recursion",
    "{{ ''.__class__.__mro__ }}": "is unsafe",
    "{{ messages.append(1) }}": "is unsafe",
    "{{ 1 / (messages | length - 2) }}": "division by zero",
    "{% import 'os' as os %}": "no loader",
    "{{ raise_exception('no system\\nrole') }}": "(no system role)",
    "{% for %}": "not valid Jinja",
}


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_ends_in_one_line(source):
    with pytest.raises(UserError, match="chat template: ") as refused:
        renderer(source)(TURNS, True, "<eos>", "<end>")
    assert HOSTILE[source] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_forked_process_has_a_renderer_of_its_own():
    render = renderer("{{ messages[0].content }}")
    assert render(TURNS, True, "", "") == "Be brief."
    child = os.fork()
    if child == 0:
        again = renderer("{{ messages[0].content }}")
        os._exit(0 if again is not render and again(TURNS, True, "", "") == "Be brief." else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render(TURNS, True, "", "") == "Be brief."


@pytest.mark.parametrize("config", ["{", "[]", "\x00", '{"chat_template": 3}'])
def test_a_damaged_tokenizer_config_has_no_template_or_is_one_line(
    config, small_tokenizer, tmp_path
):
    (tmp_path / "tokenizer.json").write_bytes(small_tokenizer.read_bytes())
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(config)
    if config.startswith('{"'):
        assert not has_own_template(tokenizer)
    else:
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            has_own_template(tokenizer)

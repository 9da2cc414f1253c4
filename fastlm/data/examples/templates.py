"""Dialogues to token ids, and which of them the loss counts.

A template is Jinja over `messages` (role, content, input), `add_generation_prompt` and `eos_token`,
as in Hugging Face tokenizers. The response to a turn is what the template adds when the assistant's
message follows the generation prompt, so any template serves whose text grows by its end; each
response, with its end-of-turn, is counted, and nothing else is. Prompt and response are encoded
apart, as they are at generation. The last response always closes with the end-of-text token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlm.data.examples.formats import Dialogue, Message
from fastlm.data.examples.rendering import renderer
from fastlm.errors import UserError, check
from fastlm.schema import read_object
from fastlm.tokenizer import Tokenizer

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{{- '\\n\\n' + message.input if message.input }}{{ end_of_turn + '\\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"""

# The prompts of Stanford Alpaca (Taori et al. 2023).
ALPACA = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' -%}{{ '### Response:\\n' + message.content + eos_token }}
{%- else -%}
{%- if not loop.first and messages[loop.index0 - 1].role == 'assistant' -%}{{ '\\n\\n' }}
{%- elif message.input -%}
{{ 'Below is an instruction that describes a task, paired with an input \
that provides further context. ' -}}
{{ 'Write a response that appropriately completes the request.\\n\\n' }}
{%- else -%}
{{ 'Below is an instruction that describes a task. ' -}}
{{ 'Write a response that appropriately completes the request.\\n\\n' }}
{%- endif -%}
{{ '### Instruction:\\n' + message.content + '\\n\\n' -}}
{{ '### Input:\\n' + message.input + '\\n\\n' if message.input }}
{%- endif -%}
{%- endfor -%}
{{ '### Response:\\n' if add_generation_prompt }}"""

MAX_BYTES = 1 << 20  # of a template; published ones have a few kilobytes
TEMPLATES = {"chatml": CHATML, "alpaca": ALPACA}
DEFAULTS = {"chat": "chatml", "alpaca": "alpaca", "text": "none", "hh": "none"}


class EncodedSequence(NamedTuple):
    """Token ids, (n,) int32, and which of them are counted as targets, (n,) bool."""

    ids: np.ndarray
    counted: np.ndarray


def template_source(name: str, tokenizer: Tokenizer) -> str:
    """The Jinja text of a template.

    name: "chatml", "alpaca", "tokenizer" (its own), or a file; "auto" and "none" have no text.
    """
    if name in TEMPLATES or name in ("auto", "none"):
        return TEMPLATES.get(name, name)
    if name == "tokenizer":
        return _own_template(tokenizer)
    file = Path(name).expanduser()
    if not file.is_file():
        known = ", ".join(["auto", "none", "tokenizer", *TEMPLATES])
        raise UserError(f"chat template {name!r}: expected {known} or a Jinja file")
    return _read(file)


def _read(file: Path) -> str:
    """A template's file; UserError where it is not text, or too long to be a template."""
    mend = "name another --template"
    size = file.stat().st_size
    check(size <= MAX_BYTES, f"{file}: {size:,} bytes, expected at most {MAX_BYTES:,}; {mend}")
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"could not read {file}: {error}; {mend}") from None


def _own_template(tokenizer: Tokenizer) -> str:
    """The chat template in the tokenizer's folder; UserError where there is none."""
    template = _beside(tokenizer)
    if template is None:
        raise UserError(
            f"chat template tokenizer: {tokenizer.name} has none beside it; "
            "name chatml, alpaca or a Jinja file"
        )
    return template


def _beside(tokenizer: Tokenizer) -> str | None:
    """chat_template.jinja in the tokenizer's folder, or chat_template of tokenizer_config.json."""
    folder = Path(tokenizer.name).parent
    if (folder / "chat_template.jinja").is_file():
        return _read(folder / "chat_template.jinja")
    if (folder / "tokenizer_config.json").is_file():
        mend = "fetch the file again, or name another --template"
        template = read_object(folder / "tokenizer_config.json", mend).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def has_own_template(tokenizer: Tokenizer) -> bool:
    return tokenizer.name != "gpt2" and _beside(tokenizer) is not None


def published_template(name: str, tokenizer: Tokenizer) -> str:
    """A template's text as other programs understand it: it sets the one variable of its own."""
    source = template_source(name, tokenizer)
    if "end_of_turn" not in source:
        return source
    return f"{{%- set end_of_turn = {json.dumps(_end_of_turn(tokenizer))} -%}}{source}"


def _end_of_turn(tokenizer: Tokenizer) -> str:
    return "<|im_end|>" if "<|im_end|>" in tokenizer.specials else tokenizer.piece(tokenizer.eos_id)


def template_of(dialogue: Dialogue, template: str) -> str:
    """The template that a dialogue is encoded with: auto goes by its form."""
    return DEFAULTS[dialogue.form] if template == "auto" else template


def encode_dialogue(
    dialogue: Dialogue, tokenizer: Tokenizer, template: str = "auto"
) -> EncodedSequence:
    """Ids of a dialogue with its last end-of-text, and which are counted.

    template: "auto" (by its form: ChatML for chat, Alpaca's for Alpaca records, none for running
    text), a name of TEMPLATES, "tokenizer" (its own), a Jinja file, or "none". Raises UserError
    where the template cannot render the dialogue.
    """
    chosen = template_of(dialogue, template)
    if chosen == "none":
        if dialogue.raw is None:
            raise UserError(
                "chat template none: these records are messages; "
                "name chatml, alpaca or a Jinja file"
            )
        segments = [(dialogue.raw[0], False), (dialogue.raw[1], True)]
    else:
        segments = render_segments(dialogue.messages, tokenizer, template_source(chosen, tokenizer))
    literal = literals(dialogue.messages, tokenizer)
    parts = []
    masks = []
    for text, counted in segments:
        ids = _encode(text, literal, tokenizer, chosen != "none")
        parts.append(ids)
        masks.append(np.full(len(ids), counted))
    if not len(parts[-1]) or parts[-1][-1] != tokenizer.eos_id:
        parts.append(np.array([tokenizer.eos_id]))
        masks.append(np.array([True]))
    return EncodedSequence(np.concatenate(parts).astype(np.int32), np.concatenate(masks))


def literals(messages: Sequence[Message], tokenizer: Tokenizer) -> list[str]:
    """What is encoded as ordinary text: all messages, if one spells out a special token."""
    special = any(s in m.content or s in m.input for s in tokenizer.specials for m in messages)
    return [text for m in messages for text in (m.content, m.input) if text] if special else []


def _encode(text: str, literal: Sequence[str], tokenizer: Tokenizer, specials: bool) -> np.ndarray:
    """Ids of a segment; special tokens are those of the template, not those a record spells out."""
    for content in literal:
        if content in text:
            before, after = text.split(content, 1)
            parts = [_encode(before, literal, tokenizer, specials), tokenizer.encode_array(content)]
            return np.concatenate([*parts, _encode(after, literal, tokenizer, specials)])
    return tokenizer.encode_array(text, specials=specials)


def render_segments(
    messages: Sequence[Message], tokenizer: Tokenizer, source: str
) -> list[tuple[str, bool]]:
    """The rendered dialogue up to its last response, cut into (text, whether it is counted)."""
    render = renderer(source, source in TEMPLATES.values())
    end = tokenizer.piece(tokenizer.eos_id)
    turn_end = _end_of_turn(tokenizer)
    segments: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = render(messages[:number], True, end, turn_end)
        after = render(messages[: number + 1], False, end, turn_end)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError(
                "chat template: a later turn changes the text of an earlier one, so responses "
                "cannot be told apart; use a template that only appends"
            )
        # Of a template without a generation prompt, the turn's heading comes with the answer; it is
        # not counted.
        heading, answer, _ = after[len(before) :].partition(message.content.strip())
        before += heading if answer and heading.strip() else ""
        response = after[len(before) :]
        stripped = response.rstrip("\n")
        kept = stripped if stripped.endswith((end, turn_end)) else response
        segments += [(before[len(done) :], False), (kept, True)]
        done = before + kept
    return segments


def render_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: str = "chatml"
) -> str:
    """The text to generate from: the dialogue so far and the opening of the assistant's turn."""
    if template == "none":
        return "".join(m.content for m in messages)
    end = tokenizer.piece(tokenizer.eos_id)
    render = renderer(template_source(template, tokenizer), template in TEMPLATES)
    return render(messages, True, end, _end_of_turn(tokenizer))


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, template: str = "chatml"
) -> list[int]:
    """Ids of render_prompt()'s text; special tokens that a message spells out are ordinary text."""
    text = render_prompt(messages, tokenizer, template)
    return _encode(text, literals(messages, tokenizer), tokenizer, True).tolist()

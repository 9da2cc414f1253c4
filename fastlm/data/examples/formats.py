"""Records of instruction and preference data, in the forms people publish them, as dialogues.

    Alpaca              {"instruction", "input" (optional), "output"}
    prompt/completion   {"prompt", "completion"} ("response" will do), text or messages
    chat                {"messages": [{"role", "content"}, ...]}
                        ("conversations" with "from" and "value" will do)
    preference          {"prompt", "chosen", "rejected"}, each text or messages;
                        the prompt may be inside both
    HH-RLHF             {"chosen", "rejected"}, each text of "\\n\\nHuman: ..." and
                        "\\n\\nAssistant: ..." turns, cut at the LAST Assistant

A record that fits none raises RecordProblem with what is wrong; the reader reports it with file and
line.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class RecordProblem(ValueError):
    """What is wrong with a record, without its place."""


class Message(NamedTuple):
    """One turn; `input` is Alpaca's second field, which a template may show apart."""

    role: str
    content: str
    input: str = ""


class Dialogue(NamedTuple):
    """Turns that end with the assistant's.

    form: the record's format, which decides the default template. raw: prompt and response are one
    running text (prompt/completion, HH-RLHF); without a template they are joined as is.
    """

    messages: list[Message]
    form: str
    raw: tuple[str, str] | None = None


class Preference(NamedTuple):
    """The same prompt answered twice: two dialogues that differ in their last turn."""

    chosen: Dialogue
    rejected: Dialogue


def read_dialogue(record: dict[str, Any]) -> Dialogue:
    """An instruction record as a dialogue.

    Raises RecordProblem where a field is missing or of the wrong type, or the response empty.
    """
    if "messages" in record or "conversations" in record:
        key = "messages" if "messages" in record else "conversations"
        messages = _messages(record[key], key)
        if messages[-1].role != "assistant":
            raise RecordProblem(
                f"{key!r} ends with a {messages[-1].role} turn, expected an assistant turn"
            )
        return Dialogue(messages, "chat")
    if "instruction" in record:
        answer = _text(record, "output" if "output" in record else "response")
        extra = record.get("input") or ""
        if not isinstance(extra, str):
            raise RecordProblem(f"field 'input': expected text, got {type(extra).__name__}")
        question = _text(record, "instruction")
        return Dialogue(
            [
                Message("user", question, extra if extra.strip() else ""),
                Message("assistant", answer),
            ],
            "alpaca",
        )
    if "prompt" in record:
        key = next(
            (k for k in ("completion", "response", "output", "answer") if k in record), "completion"
        )
        if isinstance(record["prompt"], list):
            messages = _messages(record["prompt"], "prompt")
            return Dialogue([*messages, _last_turn(record.get(key), key)], "chat")
        prompt = _text(record, "prompt")
        answer = _text(record, key)
        return Dialogue(
            [Message("user", prompt), Message("assistant", answer)], "text", (prompt, answer)
        )
    raise RecordProblem(
        "expected the fields messages, instruction/output or prompt/completion, "
        f"got {_names(record)}"
    )


def read_preference(record: dict[str, Any]) -> Preference:
    """A preference record as two dialogues with one prompt; RecordProblem where that cannot be."""
    missing = [key for key in ("chosen", "rejected") if key not in record]
    if missing:
        raise RecordProblem(f"no field {missing[0]!r}, got {_names(record)}")
    if isinstance(record["chosen"], list):
        pair = _chat_preference(record)
    elif "prompt" in record:
        pair = _text_preference(record)
    else:
        pair = Preference(_hh(record, "chosen"), _hh(record, "rejected"))
        if pair.chosen.raw and pair.rejected.raw and pair.chosen.raw[0] != pair.rejected.raw[0]:
            raise RecordProblem("'chosen' and 'rejected' differ before the last Assistant turn")
    if pair.chosen.messages[-1].content == pair.rejected.messages[-1].content:
        raise RecordProblem("'chosen' and 'rejected' are the same")
    return pair


def _text_preference(record: dict[str, Any]) -> Preference:
    if isinstance(record["prompt"], list):
        prompt = _messages(record["prompt"], "prompt")
        both = [
            Dialogue([*prompt, Message("assistant", _text(record, key))], "chat")
            for key in ("chosen", "rejected")
        ]
    else:
        text = _text(record, "prompt")
        answers = [_text(record, key) for key in ("chosen", "rejected")]
        both = [
            Dialogue([Message("user", text), Message("assistant", a)], "text", (text, a))
            for a in answers
        ]
    return Preference(*both)


def _chat_preference(record: dict[str, Any]) -> Preference:
    """Turns in both fields: whole dialogues, or only the answer after a prompt of its own."""
    chosen, rejected = (_messages(record[key], key) for key in ("chosen", "rejected"))
    prompt: list[Message] = []
    if isinstance(record.get("prompt"), list):
        prompt = _messages(record["prompt"], "prompt")
    elif len(chosen) == 1 and isinstance(record.get("prompt"), str):
        prompt = [Message("user", _text(record, "prompt"))]
    if len(chosen) == 1:
        chosen = [*prompt, *chosen]
        rejected = [*prompt, *rejected]
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise RecordProblem(
            "'chosen' and 'rejected' must be dialogues that differ in their last turn only"
        )
    if {chosen[-1].role, rejected[-1].role} != {"assistant"}:
        raise RecordProblem("'chosen' and 'rejected' must end with an assistant turn")
    return Preference(Dialogue(chosen, "chat"), Dialogue(rejected, "chat"))


def _hh(record: dict[str, Any], key: str) -> Dialogue:
    """HH-RLHF text: the response follows the last "Assistant:"; earlier answers are prompt."""
    text = _text(record, key)
    turns = list(_HH_TURN.finditer(text))
    if not turns or turns[0].start() != 0:
        raise RecordProblem(
            f"field {key!r}: expected turns that start with '\\n\\nHuman:' or '\\n\\nAssistant:'"
        )
    if turns[-1].group(1) != "Assistant":
        raise RecordProblem(f"field {key!r} ends with a Human turn, expected an Assistant turn")
    ends = [turn.start() for turn in turns[1:]] + [len(text)]
    contents = [text[turn.end() : end].strip() for turn, end in zip(turns, ends, strict=True)]
    if not contents[-1]:
        raise RecordProblem(f"field {key!r}: the response is empty")
    messages = [Message(ROLES[t.group(1).lower()], c) for t, c in zip(turns, contents, strict=True)]
    return Dialogue(messages, "hh", (text[: turns[-1].end()], text[turns[-1].end() :].rstrip()))


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RecordProblem(f"field {key!r}: expected a list of messages, got {_kind(value)}")
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise RecordProblem(f"{key!r} message {number}: expected an object, got {_kind(item)}")
        role = item.get("role", item.get("from"))
        content = item.get("content", item.get("value"))
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise RecordProblem(
                f"{key!r} message {number}: role {role!r}, expected one of {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise RecordProblem(
                f"{key!r} message {number}: content: expected text, got {_kind(content)}"
            )
        if not content.strip():
            raise RecordProblem(f"{key!r} message {number}: the {role} turn is empty")
        messages.append(Message(ROLES[role.lower()], content))
    return messages


def _last_turn(value: Any, key: str) -> Message:
    """The answer to a prompt given as messages: text, or one assistant message."""
    if isinstance(value, str) and value.strip():
        return Message("assistant", value)
    messages = _messages(value, key)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise RecordProblem(f"field {key!r}: expected one assistant message")
    return messages[0]


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise RecordProblem(f"no field {key!r}, got {_names(record)}")
    if not isinstance(record[key], str):
        raise RecordProblem(f"field {key!r}: expected text, got {_kind(record[key])}")
    if not record[key].strip():
        raise RecordProblem(f"field {key!r} is empty")
    return record[key]


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == [] else type(value).__name__


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:8])) or "no field"

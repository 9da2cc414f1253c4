"""Chat templates to texts. A stranger's template has a process that renders it (sandbox.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from fastlm.data.examples import sandbox
from fastlm.data.examples.formats import Message
from fastlm.errors import UserError, check

# messages, whether the assistant's turn is opened, end-of-text, end of a turn -> text
Render = Callable[[Sequence[Message], bool, str, str], str]


def renderer(source: str, trusted: bool = False) -> Render:
    """The function that renders a template's text.

    trusted: one of ours, which is rendered in this process, without the way there and back. Raises
    UserError where the template is not valid Jinja; the function raises it where it cannot render
    a dialogue, takes more than 2 s or 400 MiB, or makes a text of more than 20 million characters.
    """
    # a forked process must not talk to its parent's
    return _renderer(source, trusted, os.getpid())


@cache
def _renderer(source: str, trusted: bool, process: int) -> Render:
    ask = sandbox.answers() if trusted else _start()
    answer = ask({"template": source})
    check("text" in answer, f"chat template: not valid Jinja ({answer.get('error')})")

    def render(
        messages: Sequence[Message], generation: bool, eos_token: str, end_of_turn: str
    ) -> str:
        # A template that does not know Alpaca's second field shows it with the first.
        if "input" not in source:
            messages = [
                m._replace(content=f"{m.content}\n\n{m.input}") if m.input else m for m in messages
            ]
        variables = {
            "messages": [m._asdict() for m in messages],
            "add_generation_prompt": generation,
            "eos_token": eos_token,
            "end_of_turn": end_of_turn,
            "bos_token": "",
        }
        answer = ask(variables)
        if "text" not in answer:
            raise UserError(f"chat template: cannot render a dialogue ({answer.get('error')})")
        return answer["text"]

    return render


def _start() -> Callable[[dict[str, Any]], dict[str, str]]:
    """Start a process that renders; the function sends it a line and reads its answer.

    It ends when this process does: its standard input is closed then.
    """
    # -I: neither this folder's modules nor the environment's variables are seen there
    child = subprocess.Popen(
        [sys.executable, "-I", sandbox.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    assert child.stdin is not None
    assert child.stdout is not None
    to = child.stdin
    back = child.stdout

    def ask(values: dict[str, Any]) -> dict[str, str]:
        try:
            to.write(json.dumps(values) + "\n")
            to.flush()
            line = back.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        slow = child.wait() == -getattr(signal, "SIGVTALRM", 0)
        return {"error": "it takes more than 2 s" if slow else "the process that renders it ended"}

    return ask

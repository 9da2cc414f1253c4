"""fastlm chat: a dialogue with a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from fastlm.config import ChatConfig
from fastlm.data.examples.formats import Message
from fastlm.data.examples.templates import encode_prompt
from fastlm.inference.generation import PromptCache
from fastlm.inference.text import show_at_once, write_texts
from fastlm.interop.open_model import chat_template, open_model, stop_tokens
from fastlm.runtime import pick_device
from fastlm.tokenizer import Tokenizer

# What a model that was not taught to stop writes next: the heading of the user's turn.
HEADINGS = {"chatml": "<|im_start|>", "alpaca": "### Instruction:"}
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
HELP = "An empty line or Ctrl-D ends the dialogue, /new starts another."


def lines(interactive: bool) -> Iterator[str]:
    """What the user types, a turn a line, until an empty line or the end."""
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def turn_ends(place: str, tokenizer: Tokenizer) -> set[int]:
    """The ids that end an answer: those that end a text, and the tokenizer's end of a turn."""
    names = [name for name in END_OF_TURN if name in tokenizer.specials]
    ends = {tokenizer.encode(name, specials=True)[0] for name in names}
    return stop_tokens(place, tokenizer) | ends


def chat(cfg: ChatConfig) -> int:
    """Read a turn, write the answer as it comes, go on.

    What was said stays in the cache: a turn costs only itself.
    """
    model, tokenizer = open_model(cfg.model, pick_device(cfg.device), cfg.tokenizer)
    template = chat_template(cfg.model, tokenizer) if cfg.template == "auto" else cfg.template
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{cfg.model}, chat template {template}. {HELP}")
    opening = [Message("system", cfg.system)] if cfg.system else []
    messages = list(opening)
    stop = turn_ends(cfg.model, tokenizer)
    prompt_cache = PromptCache()
    for line in lines(interactive):
        if line == "/new":
            messages = list(opening)
            continue
        messages.append(Message("user", line))
        prompt = encode_prompt(messages, tokenizer, template)
        heading = [HEADINGS[template]] if template in HEADINGS else []
        seed = cfg.seed + len(messages)
        (answer,) = write_texts(
            model,
            tokenizer,
            [prompt],
            cfg.tokens,
            cfg,
            seed,
            stop,
            heading,
            show_at_once,
            prompt_cache,
        )
        print("\n" if interactive else "")
        messages.append(Message("assistant", answer.strip()))
    return 0

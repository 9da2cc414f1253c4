"""Text as it is written, and `fastlm generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence

from fastlm.config import GenerateConfig, Sampling
from fastlm.errors import check
from fastlm.inference.generation import PromptCache, generate
from fastlm.interop.open_model import open_model, stop_tokens
from fastlm.model import Transformer
from fastlm.runtime import pick_device
from fastlm.tokenizer import Tokenizer

PARTIAL = "\ufffd"  # what the first bytes of a character decode to
CHARACTER_TOKENS = 4  # a character has at most four bytes, and a token at least one


class TextStream:
    """New ids to text: whole characters only, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = [s for s in stop if s]
        # some tokenizers write a word differently where a text begins
        self.ids = list(prompt[-CHARACTER_TOKENS:])
        self.shown = tokenizer.decode(self.ids)
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain; `stopped` is set where it ends a stop string."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith(PARTIAL) and not text.endswith(PARTIAL * CHARACTER_TOKENS):
            return ""
        self.held += text[len(self.shown) :]
        self.ids = self.ids[-CHARACTER_TOKENS:]
        self.shown = self.tokenizer.decode(self.ids)
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        self.stopped = bool(found)
        certain = min(found) if found else len(self.held) - self.undecided()
        out = self.held[:certain]
        self.held = "" if found else self.held[certain:]
        return out

    def undecided(self) -> int:
        """Characters at the end of the held text that may begin a stop string."""
        begun = (n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n]))
        return max(begun, default=0)

    def rest(self) -> str:
        """What is still held when no more tokens come."""
        tail = self.tokenizer.decode(self.ids)[len(self.shown) :]
        return "" if self.stopped else self.held + tail


def write_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: Collection[int] = (),
    stop_texts: Sequence[str] = (),
    show: Callable[[int, str], None] = lambda row, text: None,
    prompt_cache: PromptCache | None = None,
) -> list[str]:
    """The continuations of generate() as texts, each ended before the first of stop_texts.

    show(row, text) is called with each piece of text as it comes.
    """
    streams = [TextStream(tokenizer, prompt, stop_texts) for prompt in prompts]
    texts = [""] * len(prompts)

    def add(row: int, text: str) -> None:
        texts[row] += text
        show(row, text)

    def each(row: int, token: int) -> bool:
        add(row, streams[row].push(token))
        return streams[row].stopped

    generate(model, prompts, n_tokens, sampling, seed, stop, each, prompt_cache)
    for row, stream in enumerate(streams):
        add(row, stream.rest())
    return texts


def prompt_ids(tokenizer: Tokenizer, text: str, vocab_size: int) -> list[int]:
    """Ids of a prompt; an empty one starts with end-of-text.

    Raises UserError for an id that the model does not know.
    """
    ids = tokenizer.encode(text) or [tokenizer.eos_id]
    check(
        max(ids) < vocab_size,
        f"the prompt has token {max(ids)}, but the model knows {vocab_size}; "
        "pass another --tokenizer",
    )
    return ids


def show_at_once(row: int, text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def write(cfg: GenerateConfig) -> int:
    """fastlm generate: print each prompt and its continuation; a single one as it is written."""
    model, tokenizer = open_model(cfg.model, pick_device(cfg.device), cfg.tokenizer)
    prompts = [prompt_ids(tokenizer, text, model.config.vocab_size) for text in cfg.prompt]
    alone = len(prompts) == 1 and not cfg.json
    show = show_at_once if alone else lambda row, text: None
    if alone:
        show(0, cfg.prompt[0])
    ends = stop_tokens(cfg.model, tokenizer)
    texts = write_texts(model, tokenizer, prompts, cfg.tokens, cfg, cfg.seed, ends, cfg.stop, show)
    if cfg.json:
        pairs = zip(cfg.prompt, texts, strict=True)
        rows = [{"prompt": prompt, "text": text} for prompt, text in pairs]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif alone:
        print()
    else:
        print("\n\n".join(prompt + text for prompt, text in zip(cfg.prompt, texts, strict=True)))
    return 0

"""Writing with a model: the loop over new tokens, the text as it comes, and `fastlm generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlm.config import GenerateConfig, Sampling
from fastlm.decode import Cache, feed, feed_at, prefill
from fastlm.errors import check
from fastlm.interop.open_model import open_model, stop_tokens
from fastlm.model import Transformer
from fastlm.runtime import pick_device, read_later, recorded
from fastlm.sampling import choose, uniform
from fastlm.tokenizer import Tokenizer

PARTIAL = "\ufffd"  # what the first bytes of a character decode to
CHARACTER_TOKENS = 4  # a character has at most four bytes, and a token at least one


@dataclass
class Memory:
    """The cache of a dialogue and the ids that it holds: a prompt that goes on from them costs only what is new."""

    ids: list[int] = field(default_factory=list)
    cache: Cache | None = None

    def begin(self, model: Transformer, prompt: Sequence[int], n_tokens: int) -> tuple[Cache, Tensor]:
        """The cache after the prompt, with room for n_tokens more where the model's context has it, and the logits."""
        differs = (i for i, (a, b) in enumerate(zip(self.ids, prompt, strict=False)) if a != b)
        common = min(next(differs, min(len(self.ids), len(prompt))), len(prompt) - 1)
        needed = min(len(prompt) + n_tokens, model.config.max_seq_len)
        if self.cache is None or common == 0 or self.cache.capacity < needed:
            return prefill(model, [prompt], min(2 * needed, model.config.max_seq_len))
        self.cache.filled = common
        return self.cache, feed(model, self.cache, torch.tensor([prompt[common:]], device=model.embedding.device))


def write_step_by_step(
    model: Transformer,
    cache: Cache,
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    seen: Tensor | None,
    n_tokens: int,
) -> Iterator[list[int]]:
    """n_tokens tokens of each row, or as many as the cache has room for, one of each at a time."""
    for made in range(1, n_tokens + 1):
        draws = uniform(generators)[0] if sampling.temperature else None
        tokens = choose(logits, sampling, draws, seen)
        if seen is not None:
            seen[torch.arange(len(tokens)), tokens] = True
        yield tokens.tolist()
        if made == n_tokens or cache.filled == cache.capacity:
            return
        logits = feed(model, cache, tokens[:, None])


def write_in_graph(
    model: Transformer,
    cache: Cache,
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    seen: Tensor | None,
    n_tokens: int,
) -> Iterator[list[int]]:
    """The same on a GPU: a step, the choice of its tokens included, is one CUDA graph.

    It is launched before the host looks at the tokens of the step before, so the GPU never waits for
    the host. The host waits once a step, for a copy of one number a row. After the last token that is
    wanted one step may run in vain.
    """
    device = logits.device
    n_tokens = min(n_tokens, cache.capacity - cache.filled + 1)
    draws = uniform(generators, n_tokens).to(device) if sampling.temperature else None
    tokens = torch.empty(len(logits), dtype=torch.long, device=device)
    column = torch.tensor([cache.filled], device=device)
    turn = torch.zeros(1, dtype=torch.long, device=device)

    def take(logits: Tensor) -> None:
        drawn = None if draws is None else draws.index_select(0, turn)[0]
        tokens.copy_(choose(logits, sampling, drawn, seen))
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        turn.add_(1)

    def step() -> None:
        take(feed_at(model, cache, tokens, column))
        column.add_(1)

    take(logits)
    filled = cache.filled
    advance = step
    for made in range(n_tokens):
        ids = read_later(tokens, device)
        if made == 1:  # the step before has compiled what a step launches
            advance = recorded(step, device)
        if made + 1 < n_tokens:
            advance()
        cache.filled = filled + made
        yield ids()


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: Collection[int] = (),
    each: Callable[[int, int], bool] = lambda row, token: False,
    memory: Memory | None = None,
) -> list[list[int]]:
    """Continuations of the prompts, each at most n_tokens long or up to the first token of `stop`, which is left out.

    each(row, token) is called with every new token; a row for which it returns True ends there, that token included. Row
    i draws with seed + i: the same seed writes the same text, whatever the other prompts are. The model sees the last
    max_seq_len tokens; where they are used up, it goes on from the last half of them. With a memory (one prompt), what
    the prompt shares with the texts before is not computed again.
    """
    device, window = model.embedding.device, model.config.max_seq_len
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    active = set(range(len(prompts)))
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, list(prompt)] = True
    capacity = min(window, max(map(len, prompts)) + n_tokens)
    if memory is not None and len(prompts[0]) <= window:
        cache, logits = memory.begin(model, prompts[0], n_tokens)
    else:
        cache, logits = prefill(model, [p[-window:] for p in prompts], capacity)
    whole = all(len(p) <= window for p in prompts)
    write = write_in_graph if device.type == "cuda" else write_step_by_step
    made = 0
    while True:
        for tokens in write(model, cache, logits, sampling, generators, seen, n_tokens - made):
            made += 1
            for row, token in enumerate(tokens):
                if row in active:
                    if token not in stop:
                        new[row].append(token)
                    if token in stop or each(row, token):
                        active.remove(row)
            if not active:
                break
        if not active or made == n_tokens:
            break
        recent = [[*prompt, *more][-max(1, window // 2) :] for prompt, more in zip(prompts, new, strict=True)]
        cache, logits = prefill(model, recent, cache.capacity)
        whole = False
    if memory is not None:
        memory.cache = cache if whole else None
        memory.ids = [*prompts[0], *new[0]][: cache.filled] if whole else []
    return new


class TextStream:
    """New ids to text as they come: whole characters only, and nothing that may be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.ids = list(prompt[-CHARACTER_TOKENS:])  # some tokenizers write a word differently where a text begins
        self.shown = tokenizer.decode(self.ids)
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain; `stopped` is set where it completes a stop string."""
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
        out, self.held = self.held[:certain], "" if found else self.held[certain:]
        return out

    def undecided(self) -> int:
        """Characters at the end of the held text that may begin a stop string."""
        lengths = (n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n]))
        return max(lengths, default=0)

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
    memory: Memory | None = None,
) -> list[str]:
    """The continuations of generate() as texts, each ended before the first of stop_texts; show(row, text) as they come."""
    streams = [TextStream(tokenizer, prompt, stop_texts) for prompt in prompts]
    texts = [""] * len(prompts)

    def add(row: int, text: str) -> None:
        texts[row] += text
        show(row, text)

    def each(row: int, token: int) -> bool:
        add(row, streams[row].push(token))
        return streams[row].stopped

    generate(model, prompts, n_tokens, sampling, seed, stop, each, memory)
    for row, stream in enumerate(streams):
        add(row, stream.rest())
    return texts


def prompt_ids(tokenizer: Tokenizer, text: str, vocab_size: int) -> list[int]:
    """Ids of a prompt; an empty one starts with end-of-text. Ids that the model does not know raise UserError."""
    ids = tokenizer.encode(text) or [tokenizer.eos_id]
    check(max(ids) < vocab_size, f"the prompt has token {max(ids)}, but the model knows {vocab_size}; pass another --tokenizer")
    return ids


def write(cfg: GenerateConfig) -> int:
    """fastlm generate: print each prompt and its continuation; a single one as it is written."""
    model, tokenizer = open_model(cfg.model, pick_device(cfg.device), cfg.tokenizer)
    prompts = [prompt_ids(tokenizer, text, model.config.vocab_size) for text in cfg.prompt]
    alone = len(prompts) == 1 and not cfg.json

    def show(row: int, text: str) -> None:
        if alone:
            sys.stdout.write(text)
            sys.stdout.flush()

    if alone:
        show(0, cfg.prompt[0])
    texts = write_texts(model, tokenizer, prompts, cfg.tokens, cfg, cfg.seed, stop_tokens(cfg.model, tokenizer),
                        cfg.stop, show)  # fmt: skip
    if cfg.json:
        rows = [{"prompt": prompt, "text": text} for prompt, text in zip(cfg.prompt, texts, strict=True)]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif alone:
        print()
    else:
        print("\n\n".join(prompt + text for prompt, text in zip(cfg.prompt, texts, strict=True)))
    return 0

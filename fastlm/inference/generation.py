"""New tokens, one a row and step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlm.config import Sampling
from fastlm.inference.cache import KeyValueCache, feed, feed_at, prefill
from fastlm.inference.sampling import choose, uniform
from fastlm.model import Transformer
from fastlm.runtime import read_later, recorded


@dataclass
class PromptCache:
    """The cache of a dialogue and the ids that it holds.

    A prompt that goes on from them costs only what is new.
    """

    ids: list[int] = field(default_factory=list)
    cache: KeyValueCache | None = None

    def prefill(
        self, model: Transformer, prompt: Sequence[int], n_tokens: int
    ) -> tuple[KeyValueCache, Tensor]:
        """The cache after the prompt, and the logits of what comes next.

        It has room for n_tokens more, where the model's context has it.
        """
        pairs = enumerate(zip(self.ids, prompt, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(self.ids), len(prompt)))
        shared = min(shared, len(prompt) - 1)  # the last token is fed again, for its logits
        window = model.config.max_seq_len
        needed = min(len(prompt) + n_tokens, window)
        if self.cache is None or shared == 0 or self.cache.capacity < needed:
            return prefill(model, [prompt], min(2 * needed, window))
        self.cache.filled = shared
        new = torch.tensor([prompt[shared:]], device=model.embedding.device)
        return self.cache, feed(model, self.cache, new)


def write_step_by_step(
    model: Transformer,
    cache: KeyValueCache,
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    seen: Tensor | None,
    n_tokens: int,
) -> Iterator[list[int]]:
    """n_tokens tokens of each row, or as many as the cache has room for, one of each at a time.

    seen: (B, vocab_size), the tokens to penalise; None without a penalty.
    """
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
    cache: KeyValueCache,
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    seen: Tensor | None,
    n_tokens: int,
) -> Iterator[list[int]]:
    """The same on a GPU: a step, the choice of its tokens included, is one CUDA graph.

    It is launched before the host looks at the tokens of the step before, so the GPU never waits
    for the host. The host waits once a step, for a copy of one number a row. After the last token
    that is wanted one step may run in vain.
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


def tokens_seen(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """(B, vocab_size) bool: the tokens of each prompt."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: Collection[int] = (),
    each: Callable[[int, int], bool] = lambda row, token: False,
    prompt_cache: PromptCache | None = None,
) -> list[list[int]]:
    """Continuations of the prompts, each at most n_tokens long or up to a token of `stop`.

    The stop token is left out. each(row, token) is called with every new token; a row for which it
    returns True ends there, that token included. Row i draws with seed + i: the same seed writes
    the same text, whatever the other prompts are. The model sees the last max_seq_len tokens; where
    they are used up, it goes on from the last half of them. With a prompt_cache (one prompt), what
    the prompt shares with the texts before is not computed again.
    """
    device = model.embedding.device
    window = model.config.max_seq_len
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    active = set(range(len(prompts)))
    seen = None
    if sampling.repetition_penalty != 1:
        seen = tokens_seen(prompts, model.config.vocab_size, device)
    capacity = min(window, max(map(len, prompts)) + n_tokens)
    if prompt_cache is not None and len(prompts[0]) <= window:
        cache, logits = prompt_cache.prefill(model, prompts[0], n_tokens)
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
        texts = ([*prompt, *more] for prompt, more in zip(prompts, new, strict=True))
        recent = [text[-max(1, window // 2) :] for text in texts]
        cache, logits = prefill(model, recent, cache.capacity)
        whole = False
    if prompt_cache is not None:
        prompt_cache.cache = cache if whole else None
        prompt_cache.ids = [*prompts[0], *new[0]][: cache.filled] if whole else []
    return new

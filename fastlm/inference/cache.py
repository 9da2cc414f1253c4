"""A cache of keys and values: prompts in one packed pass, then a token a row and step.

The model's own blocks run, and attend to the cache. All rows end at the same column of it, so that
a step writes one column; the columns before a shorter row's first token are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import kernels
from fastlm.kernels.attention import Documents, attention, takes_mask
from fastlm.model import Layout, Transformer
from fastlm.model.block import Attend


@dataclass
class KeyValueCache:
    """Rotated keys and values of what each row has seen."""

    keys: list[Tensor]  # one a layer: (B, Hkv, capacity, Dh)
    values: list[Tensor]
    start: Tensor  # (B,) column of a row's first token
    filled: int  # columns
    mask: Tensor | None  # (B, 1, 1, capacity): from a row's first token on; None: all start at 0

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]


def hidden(model: Transformer, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Hidden states (B, T, D) of tokens (B, T) at positions (B, T)."""
    layout = Layout(model.cos, model.sin, positions, attend=attend)
    return model.run_blocks(kernels.embedding(tokens, model.embedding), layout)


def next_logits(model: Transformer, h: Tensor) -> Tensor:
    """(B, vocab_size) of the last hidden states (B, D)."""
    return kernels.linear(h, model.head_weight[: model.config.vocab_size])


@torch.inference_mode()
def prefill(
    model: Transformer, prompts: Sequence[Sequence[int]], capacity: int
) -> tuple[KeyValueCache, Tensor]:
    """The cache after the prompts, and the logits (B, vocab_size) of what comes next.

    The prompts lie end to end in one pass; none sees another, and there is no padding. The cache
    has room for `capacity` columns, on a GPU a few more, so that the rows of a mask are aligned.
    """
    c = model.config
    like = model.embedding
    if like.is_cuda:
        capacity = min(-(-capacity // 16) * 16, max(capacity, c.max_seq_len))
    lengths = [len(p) for p in prompts]
    longest = max(lengths)
    ends = list(accumulate(lengths, initial=0))
    start = torch.tensor([longest - n for n in lengths], device=like.device)
    shape = (len(prompts), c.n_kv_heads, capacity, c.head_dim)
    ragged = min(lengths) < longest
    # what is masked must be finite, on a GPU all that is not written yet; the rest is not read
    new = like.new_zeros if ragged or like.is_cuda else like.new_empty
    keys = [new(shape) for _ in range(c.n_layers)]
    values = [new(shape) for _ in range(c.n_layers)]
    mask = None
    if ragged:
        columns = torch.arange(capacity, device=like.device)
        mask = (columns >= start[:, None])[:, None, None]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=like.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for row, (a, b) in enumerate(pairwise(ends)):
            place = slice(longest - (b - a), longest)
            keys[layer][row, :, place] = k[0, a:b].transpose(0, 1)
            values[layer][row, :, place] = v[0, a:b].transpose(0, 1)
        if len(lengths) == 1:
            return attention(q, k, v)
        if takes_mask(q, "torch"):  # one mask for all would be large, and their ends are known
            alone = [attention(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in pairwise(ends)]
            return torch.cat(alone, 1)
        return attention(q, k, v, Documents(cu_seqlens, longest))

    tokens = torch.tensor([[t for p in prompts for t in p]], device=like.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(like.device)
    last = hidden(model, tokens, positions, attend)[0, cu_seqlens[1:].long() - 1]
    return KeyValueCache(keys, values, start, longest, mask), next_logits(model, last)


def grouped(q: Tensor, kv_heads: int) -> Tensor:
    """One token's queries (B, 1, H, Dh) as (B, Hkv, H / Hkv, Dh).

    The query heads that share a key head become so many queries of it: its keys are not copied.
    """
    return q.view(q.shape[0], kv_heads, -1, q.shape[3])


@torch.inference_mode()
def feed(model: Transformer, cache: KeyValueCache, tokens: Tensor) -> Tensor:
    """Add tokens (B, n) to the cache; the logits (B, vocab_size) of what comes next."""
    n = tokens.shape[1]
    a = cache.filled
    b = a + n
    cache.filled = b
    positions = torch.arange(a, b, device=tokens.device) - cache.start[:, None]
    mask = None if cache.mask is None else cache.mask[..., :b]
    if n > 1:
        past = torch.ones(n, b, dtype=torch.bool, device=tokens.device).tril(a)
        mask = past if mask is None else mask & past

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = cache.keys[layer][:, :, :b]
        values = cache.values[layer][:, :, :b]
        keys[:, :, a:] = k.transpose(1, 2)
        values[:, :, a:] = v.transpose(1, 2)
        if n == 1:
            q_of_group = grouped(q, k.shape[2])
            return F.scaled_dot_product_attention(q_of_group, keys, values, mask).reshape(q.shape)
        q = q.transpose(1, 2)
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True).transpose(
            1, 2
        )

    return next_logits(model, hidden(model, tokens, positions, attend)[:, -1])


@torch.inference_mode()
def feed_at(model: Transformer, cache: KeyValueCache, tokens: Tensor, column: Tensor) -> Tensor:
    """feed() of one token a row, (B,), into the column that a tensor (1,) names.

    The work is the same whatever the column is, so that a CUDA graph can replay it: all columns are
    read, those that are not written yet behind a mask. cache.filled is left to the caller.
    """
    start = cache.start[:, None]
    columns = torch.arange(cache.capacity, device=tokens.device)
    seen = ((columns >= start) & (columns <= column))[:, None, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = cache.keys[layer]
        values = cache.values[layer]
        keys.index_copy_(2, column, k.transpose(1, 2))
        values.index_copy_(2, column, v.transpose(1, 2))
        out = F.scaled_dot_product_attention(grouped(q, k.shape[2]), keys, values, seen)
        return out.reshape(q.shape)

    return next_logits(model, hidden(model, tokens[:, None], column - start, attend)[:, -1])

"""The model with a cache of keys and values: prompts in one packed pass, then a token a row and step.

The weights are the training model's own. All rows end at the same column of the cache, so that a step writes one column
of it; the columns before a shorter row's first token are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import kernels
from fastlm.kernels import native
from fastlm.kernels.attention import Documents, attention, takes_mask
from fastlm.model import Block, Transformer

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
FEW_ROWS = 32  # up to so many, the native kernel is faster than the BLAS library (160 and 198 ms at 32 rows of SmolLM2)


@dataclass
class Cache:
    """Rotated keys and values of what each row has seen."""

    keys: list[Tensor]  # one a layer: (B, Hkv, capacity, Dh)
    values: list[Tensor]
    start: Tensor  # (B,) column of a row's first token
    filled: int  # columns
    mask: Tensor | None  # (B, 1, 1, capacity): True from a row's first token on; None where all rows start at column 0

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]


class Ops(NamedTuple):
    """What the blocks are made of."""

    add_norm: Callable[..., tuple[Tensor, Tensor]]  # as model.add_norm
    linear: Callable[..., Tensor]
    rope: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]


def add_norm(update: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x is None:
        return kernels.rms_norm(update, weight, eps), update
    return kernels.add_rms_norm(update, x, weight, eps)


def native_add_norm(update: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return native.rms_norm(update, x, weight, eps)[:2]


def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; a step of few rows is bound by reading the weights, which the native kernel does once."""
    if x.shape[:-1].numel() > FEW_ROWS:
        return F.linear(x, weight, bias)
    y = native.few_rows_linear(x, weight)
    return y if bias is None else y + bias


def native_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return native.rope(q, k, cos, sin, positions, False)


REGISTERED = Ops(add_norm, F.linear, kernels.rope, kernels.swiglu)
# The same kernels without PyTorch's dispatcher: of a step of SmolLM2-135M on a CPU that takes a tenth.
NATIVE = Ops(native_add_norm, native_linear, native_rope, native.swiglu)


def choose_ops(weight: Tensor) -> Ops:
    return NATIVE if weight.device.type == "cpu" and native.available(weight) else REGISTERED


def hidden(model: Transformer, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Hidden states (B, T, D) of tokens (B, T) at positions (B, T): the blocks of model.py, without autograd.

    attend(layer, q, k, v): attention of q (B, T, H, Dh) over whatever the caller keeps, as (B, T, H * Dh).
    """
    c, op = model.config, choose_ops(model.embedding)
    heads = [c.n_heads, c.n_kv_heads, c.n_kv_heads]
    update, x = F.embedding(tokens, model.embedding), None
    for i, block in enumerate(cast(Iterable[Block], model.blocks)):
        h, x = op.add_norm(update, x, block.attention_norm.weight, c.norm_eps)
        qkv = op.linear(h, block.qkv.weight, block.qkv.bias)
        q, k, v = qkv.view(*tokens.shape, -1, c.head_dim).split(heads, 2)  # (B, T, H, Dh)
        if block.q_norm is not None and block.k_norm is not None:
            q, k = kernels.rms_norm(q, block.q_norm.weight, c.norm_eps), kernels.rms_norm(k, block.k_norm.weight, c.norm_eps)
        q, k = op.rope(q, k, model.cos, model.sin, positions)
        h, x = op.add_norm(op.linear(attend(i, q, k, v), block.out.weight), x, block.ffn_norm.weight, c.norm_eps)
        update = op.linear(op.swiglu(op.linear(h, block.gate_up.weight)), block.down.weight)
    return op.add_norm(update, x, model.norm.weight, c.norm_eps)[0]


def logits(model: Transformer, h: Tensor) -> Tensor:
    """(..., vocab_size) of hidden states (..., D)."""
    return choose_ops(h).linear(h, model.head_weight[: model.config.vocab_size])


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Cache, Tensor]:
    """The cache after the prompts, with room for `capacity` columns, and the logits (B, vocab_size) of what comes next.

    The prompts lie end to end in one pass; none sees another, and there is no padding. On a GPU the
    columns may be a few more, so that the rows of a mask are aligned.
    """
    c, like = model.config, model.embedding
    if like.is_cuda:
        capacity = min(-(-capacity // 16) * 16, max(capacity, c.max_seq_len))
    lengths = [len(p) for p in prompts]
    longest, ends = max(lengths), list(accumulate(lengths, initial=0))
    start = torch.tensor([longest - n for n in lengths], device=like.device)
    shape = (len(prompts), c.n_kv_heads, capacity, c.head_dim)
    ragged = min(lengths) < longest
    # what is masked must be finite, on a GPU all that is not written yet; the rest is not read
    new = like.new_zeros if ragged or like.is_cuda else like.new_empty
    keys, values = ([new(shape) for _ in range(c.n_layers)] for _ in range(2))
    mask = (torch.arange(capacity, device=like.device) >= start[:, None])[:, None, None] if ragged else None
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=like.device)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for row, n in enumerate(lengths):
            place = slice(longest - n, longest)
            keys[i][row, :, place] = k[0, ends[row] : ends[row + 1]].transpose(0, 1)
            values[i][row, :, place] = v[0, ends[row] : ends[row + 1]].transpose(0, 1)
        if len(lengths) == 1:
            return attention(q, k, v).flatten(2)
        if takes_mask(q, "torch"):  # one mask for all prompts would be large; their ends are known
            alone = [attention(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in pairwise(ends)]
            return torch.cat(alone, 1).flatten(2)
        return attention(q, k, v, Documents(cu_seqlens, longest)).flatten(2)

    tokens = torch.tensor([[t for p in prompts for t in p]], device=like.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(like.device)
    last = hidden(model, tokens, positions, attend)[0, cu_seqlens[1:].long() - 1]
    return Cache(keys, values, start, longest, mask), logits(model, last)


def feed(model: Transformer, cache: Cache, tokens: Tensor) -> Tensor:
    """Add tokens (B, n) to the cache; the logits (B, vocab_size) of what comes next."""
    c, (rows, n) = model.config, tokens.shape
    a, b = cache.filled, cache.filled + n
    cache.filled = b
    positions = torch.arange(a, b, device=tokens.device) - cache.start[:, None]
    mask = None if cache.mask is None else cache.mask[..., :b]
    if n > 1:
        past = torch.ones(n, b, dtype=torch.bool, device=tokens.device).tril(a)
        mask = past if mask is None else mask & past

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.keys[i], cache.values[i]
        keys[:, :, a:b], values[:, :, a:b] = k.transpose(1, 2), v.transpose(1, 2)
        if n == 1:  # a group's query heads, which share keys, as so many queries of one head: no copies of the keys
            q = q.view(rows, c.n_kv_heads, -1, c.head_dim)
            return F.scaled_dot_product_attention(q, keys[:, :, :b], values[:, :, :b], mask).reshape(rows, 1, -1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys[:, :, :b], values[:, :, :b], mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    return logits(model, hidden(model, tokens, positions, attend)[:, -1])


def feed_at(model: Transformer, cache: Cache, tokens: Tensor, column: Tensor) -> Tensor:
    """feed() of one token a row, (B,), into the column that a tensor (1,) names.

    The work is the same whatever the column is, so that a CUDA graph can replay it: all columns are
    read, those that are not written yet behind a mask. cache.filled is left to the caller.
    """
    c = model.config
    rows = len(tokens)
    start = cache.start[:, None]
    columns = torch.arange(cache.capacity, device=tokens.device)
    seen = ((columns >= start) & (columns <= column))[:, None, None]

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.keys[i], cache.values[i]
        keys.index_copy_(2, column, k.transpose(1, 2))
        values.index_copy_(2, column, v.transpose(1, 2))
        q = q.view(rows, c.n_kv_heads, -1, c.head_dim)
        return F.scaled_dot_product_attention(q, keys, values, seen).reshape(rows, 1, -1)

    return logits(model, hidden(model, tokens[:, None], column - start, attend)[:, -1])

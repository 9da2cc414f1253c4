"""What a forward pass keeps for the backward pass, and what that computes again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fastlm.model.counts import count_parameters
from fastlm.model.layers import SwiGLULinear

if TYPE_CHECKING:
    from fastlm.model.transformer import Transformer


def recompute_all_but_attention(
    context: Any, op: Any, *args: Any, **options: Any
) -> CheckpointPolicy:
    """Attention is kept: it costs the most to repeat for what it takes, one (B, T, D) a layer."""
    kept = any(word in str(op) for word in ("attention", "attn", "packed_documents"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


keep_attention = partial(create_selective_checkpoint_contexts, recompute_all_but_attention)


def keep_what_fits(model: Transformer, tokens: int, memory_bytes: int, itemsize: int) -> None:
    """Keep what the backward would compute again, where half of a GPU's memory has room for it.

    That is SwiGLU's product and, behind logprobs(), logits, beside 16 bytes a parameter and the
    activations of `tokens` tokens, itemsize bytes a number. Called once, before a step is compiled,
    with the GPU's whole memory: what is free at the moment would make one run differ from the next.
    Where activations are recomputed, memory is short.
    """
    c = model.config
    heads = 2 * (c.n_heads + c.n_kv_heads) * c.head_dim
    numbers = 4 * c.dim + heads + 2 * c.ffn_dim  # of a token in a layer
    layers = tokens * c.n_layers * itemsize
    product = layers * c.ffn_dim
    room = memory_bytes // 2 - 16 * count_parameters(c) - layers * numbers
    keep = product <= room and not model.checkpoint_activations
    for module in model.modules():
        if isinstance(module, SwiGLULinear):
            module.keep_product = keep
    model.keep_logits_bytes = max(0, room - product if keep else room)

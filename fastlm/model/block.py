"""One layer of the transformer, for training and for generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fastlm import kernels
from fastlm.config import ModelConfig
from fastlm.kernels.attention import Documents, attention
from fastlm.model.layers import AddRMSNorm, Linear, RMSNorm, SplitLinear, SwiGLULinear

# attend(layer, q, k, v): attention of q (B, T, H, Dh) over what the caller keeps of k and v
# (B, T, Hkv, Dh), as (B, T, H, Dh).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """Where the tokens (B, T) of a batch stand and what they see: the same in all blocks.

    cos, sin: (max_seq_len, Dh / 2), the rotary table. positions: (B, T), or None for 0 to T - 1 in
    every row. documents: boundaries of packed documents, and what they share; None for plain rows.
    backend: of attention(). attend: attention over a cache, in place of attention().
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None = None
    documents: Documents | None = None
    backend: str = "torch"
    attend: Attend | None = None


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + SwiGLU(norm(x)).

    The second addition of a layer is done by the first norm of the next one, in the same pass over
    memory. So x and the update that is still to be added to it travel side by side.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c = config
        self.layer = layer
        self.head_dim = c.head_dim
        heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)
        self.attention_norm = AddRMSNorm(c.dim, c.norm_eps)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.ffn_norm = AddRMSNorm(c.dim, c.norm_eps)
        self.qkv = SplitLinear(c.dim, [n * c.head_dim for n in heads], c.qkv_bias)
        self.out = Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.gate_up = Linear(c.dim, 2 * c.ffn_dim, bias=False)  # rows: gate, up
        self.down = SwiGLULinear(c.ffn_dim, c.dim)

    def forward(self, update: Tensor, x: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """update, x: (B, T, D), x without the update, or None. Returns the next block's pair."""
        normed, x = self.attention_norm(update, x)  # x = x + update
        update = self.attention(normed, layout)
        normed, x = self.ffn_norm(update, x)  # x = x + attention(norm(x))
        update = self.down(self.gate_up(normed))
        return update, x  # the next norm adds them up: x = x + SwiGLU(norm(x))

    def attention(self, x: Tensor, layout: Layout) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        rows, length, _ = x.shape
        # (B, T, heads, Dh)
        q, k, v = (z.view(rows, length, -1, self.head_dim) for z in self.qkv(x))
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q, k = kernels.rope(q, k, layout.cos, layout.sin, layout.positions)
        if layout.attend is None:
            seen = attention(q, k, v, layout.documents, layout.backend)
        else:
            seen = layout.attend(self.layer, q, k, v)
        return self.out(seen.flatten(2))

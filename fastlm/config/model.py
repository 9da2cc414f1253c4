"""The shape of a model, and the shapes that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastlm.config.checks import check_not_negative, check_positive
from fastlm.errors import check, divisors

VOCAB_MULTIPLE = 64  # matmul tiles are whole when the padded vocabulary is a multiple of this


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-style decoder: RMSNorm, RoPE (half-rotation), grouped-query attention,
    SwiGLU, no biases."""

    vocab_size: int = 50257
    """Number of tokens the model knows (padded to a multiple of 64 inside, never visible
    outside)."""
    dim: int = 1024
    """Width of the residual stream, channels."""
    n_layers: int = 12
    """Number of blocks."""
    n_heads: int = 16
    """Query heads; must divide dim."""
    n_kv_heads: int = 16
    """Key/value heads (grouped-query attention); must divide n_heads."""
    ffn_dim: int = 4096
    """Width of the SwiGLU feed-forward, channels."""
    max_seq_len: int = 1024
    """Longest sequence the position table covers, tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head too."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys before RoPE (as in Qwen3)."""
    qkv_bias: bool = False
    """Biases on queries, keys and values (as in Qwen2)."""
    head_width: int = 0
    """Channels per head where that is not dim / n_heads (0)."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How a model was stretched to longer texts: linear divides all positions by rope_factor;
    llama3 only long waves."""
    rope_factor: float = 1.0
    """By how much the context was stretched."""
    rope_low_freq_factor: float = 1.0
    """llama3: waves longer than rope_original_len / this are divided in full."""
    rope_high_freq_factor: float = 4.0
    """llama3: waves shorter than rope_original_len / this stay as they are."""
    rope_original_len: int = 8192
    """llama3: the context before stretching, tokens."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len")
        check_positive(self, *sizes, "rope_theta", "norm_eps", "rope_factor", table="model.")
        check_not_negative(self, "head_width", table="model.")
        check(
            self.head_width > 0 or self.dim % self.n_heads == 0,
            f"model.n_heads is {self.n_heads}, which does not divide model.dim {self.dim}; "
            f"choose n_heads among {divisors(self.dim)}",
        )
        check(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_kv_heads is {self.n_kv_heads}, which does not divide "
            f"model.n_heads {self.n_heads}; choose n_kv_heads among {divisors(self.n_heads)}",
        )
        check(
            self.head_dim % 2 == 0,
            f"a head has {self.head_dim} channels; RoPE rotates pairs, so it must be even: "
            "change model.n_heads",
        )

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.n_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


PRESETS: dict[str, ModelConfig] = {
    # the published 253M shape
    "modern-253m": ModelConfig(),
    "modern-124m": ModelConfig(dim=768, n_heads=12, n_kv_heads=12, ffn_dim=2048),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        ffn_dim=1536,
        max_seq_len=8192,
        rope_theta=100_000.0,
    ),
    # minutes on two CPU cores
    "demo": ModelConfig(
        dim=192,
        n_layers=4,
        n_heads=3,
        n_kv_heads=3,
        ffn_dim=512,
        max_seq_len=256,
        tie_embeddings=False,
        qk_norm=True,
    ),
    # for tests
    "tiny": ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=192, max_seq_len=256),
}

"""What a model of a given shape has and costs: parameters and floating-point operations."""

from __future__ import annotations

from fastlm.config import ModelConfig


def matmul_weights(config: ModelConfig) -> int:
    """Entries of the matrices of one block."""
    c = config
    qkv = c.dim * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    out = c.n_heads * c.head_dim * c.dim
    return qkv + out + 3 * c.dim * c.ffn_dim


def count_parameters(config: ModelConfig) -> int:
    """Trainable parameters, the vocabulary's padding not counted."""
    c = config
    block = matmul_weights(c) + 2 * c.dim
    if c.qk_norm:
        block += 2 * c.head_dim
    if c.qkv_bias:
        block += (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    tables = 1 if c.tie_embeddings else 2
    return tables * c.vocab_size * c.dim + c.n_layers * block + c.dim


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Operations of a token's forward and backward pass, causal, recomputation not counted.

    6 per weight that takes part in a matmul (the head does, the embedding look-up does not; 2
    forward, 4 backward), plus attention's two products over the (seq_len / 2) tokens that a token
    sees on average: 3 * 2 * 2 * (T / 2) * H * Dh per layer (PaLM, Chowdhery et al. 2022, appendix
    B, halved for the causal mask).
    """
    c = config
    weights = c.n_layers * matmul_weights(c) + c.vocab_size * c.dim
    attention = 6.0 * seq_len * c.n_heads * c.head_dim
    return 6.0 * weights + c.n_layers * attention

"""The model, read top to bottom: norm, rotary positions, attention, SwiGLU, block, transformer, initialisation, counts.

A Llama-style decoder. The residual stream x and the update that the last layer wants to add to it travel side by side,
so that each addition is fused with the norm that follows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastlm import kernels
from fastlm.bigram import bigram_tables
from fastlm.config import ModelConfig
from fastlm.errors import check
from fastlm.kernels.attention import Documents, attention, prepare


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos, sin (max_seq_len, head_dim / 2), fp32: angle = position * f_i, f_i = theta^(-2i / head_dim) (RoFormer, eq. 15).

    Scaled models: linear divides every f_i by rope_factor; llama3 only those whose wavelength 2 pi / f_i is longer than
    rope_original_len / rope_low_freq_factor, none shorter than rope_original_len / rope_high_freq_factor, and blends the
    two in between (the Llama 3.1 reference code, apply_scaling). Frequencies and angles are rounded to fp32, as in the code
    that published models were trained with: at position 1000 an angle is then off by up to 6e-5.
    """
    c = config
    frequency = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
    if c.rope_scaling == "linear":
        frequency = frequency / c.rope_factor
    elif c.rope_scaling == "llama3":
        turns = c.rope_original_len * frequency / (2 * torch.pi)  # of each wave in the original context
        kept = ((turns - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / c.rope_factor)
    angles = torch.outer(torch.arange(c.max_seq_len, dtype=torch.float32), frequency)
    return angles.cos(), angles.sin()


def add_norm(update: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + update), x + update); x is None where the stream begins."""
    if x is None:
        return kernels.rms_norm(update, weight, eps), update
    return kernels.add_rms_norm(update, x, weight, eps)


class Block(nn.Module):
    """One layer: x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d, heads, kv_heads, head_dim = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.attention_norm = nn.Parameter(torch.empty(d))
        self.qkv = nn.Linear(d, (heads + 2 * kv_heads) * head_dim, bias=config.qkv_bias)  # rows: queries, keys, values
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.empty(head_dim))
            self.k_norm = nn.Parameter(torch.empty(head_dim))
        self.out = nn.Linear(heads * head_dim, d, bias=False)
        self.ffn_norm = nn.Parameter(torch.empty(d))
        self.gate_up = nn.Linear(d, 2 * config.ffn_dim, bias=False)  # rows: gate, up
        self.down = nn.Linear(config.ffn_dim, d, bias=False)
        self.keep_product = False  # save SwiGLU's product for the backward: keep_what_fits()

    def forward(
        self,
        update: Tensor,
        x: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor | None,
        documents: Documents | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """update, x: (B, T, D), x still without update. Returns the same pair for the next block."""
        c = self.config
        h, x = add_norm(update, x, self.attention_norm, c.norm_eps)
        sizes = [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]
        parts = kernels.linear(h, self.qkv.weight, sizes)
        if c.qkv_bias:
            parts = tuple(z + b.to(z.dtype) for z, b in zip(parts, self.qkv.bias.split(sizes), strict=True))
        q, k, v = (z.unflatten(-1, (-1, c.head_dim)) for z in parts)  # (B, T, H, Dh)
        if c.qk_norm:
            q = kernels.rms_norm(q, self.q_norm, c.norm_eps)
            k = kernels.rms_norm(k, self.k_norm, c.norm_eps)
        q, k = kernels.rope(q, k, *rotary, positions)
        attended = attention(q, k, v, documents, backend).flatten(2)
        update = kernels.linear(attended, self.out.weight)
        h, x = kernels.add_rms_norm(update, x, self.ffn_norm, c.norm_eps)
        return kernels.swiglu_linear(kernels.linear(h, self.gate_up.weight), self.down.weight, self.keep_product), x


def recompute_all_but_attention(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """Attention costs the most to repeat for what it takes to keep (one (B, T, D) a layer); the rest is made again."""
    kept = any(word in str(op) for word in ("attention", "attn", "packed_documents"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


keep_attention = partial(create_selective_checkpoint_contexts, recompute_all_but_attention)


class Transformer(nn.Module):
    """Token ids to hidden states, logits or a loss.

    The vocabulary is padded to a multiple of 64 inside; logits, losses and counts never show the padding.
    """

    cos: Tensor
    sin: Tensor
    cos_half: Tensor
    sin_half: Tensor

    def __init__(self, config: ModelConfig, checkpoint_activations: bool = False, attention_backend: str = "torch"):
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        self.attention_backend = attention_backend
        self.keep_logits_bytes: int | None = None  # of logprobs() for its backward: keep_what_fits()
        self.embedding = nn.Parameter(torch.empty(config.padded_vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.empty(config.dim))
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(config.padded_vocab_size, config.dim))
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # For 16-bit activations: half the bytes, and after their rounding the same error (0.5% more, root mean square in bf16)
        self.register_buffer("cos_half", cos.half(), persistent=False)
        self.register_buffer("sin_half", sin.half(), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding if self.config.tie_embeddings else self.head

    def forward(self, tokens: Tensor, **packed) -> Tensor:
        """Hidden states after the last norm, (B, T, D), of tokens (B, T); packed as in stream()."""
        return self.stream(kernels.embedding(tokens, self.embedding), **packed)

    def stream(
        self,
        update: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sharing: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (B, T, D), of the tokens' embeddings (B, T, D).

        Packed rows: positions (B, T) restart in each document; cu_seqlens, max_seqlen and sharing as in Documents. Raises
        ValueError when cu_seqlens comes without max_seqlen.
        """
        if torch.is_autocast_enabled(update.device.type):  # the residual stream has the matmuls' dtype
            update = update.to(torch.get_autocast_dtype(update.device.type))
        rotary = (self.cos_half, self.sin_half) if update.dtype.itemsize == 2 else (self.cos, self.sin)
        documents = None
        if cu_seqlens is not None:
            if max_seqlen is None:
                raise ValueError("cu_seqlens needs max_seqlen, the length of the longest document in tokens")
            documents = prepare(Documents(cu_seqlens, max_seqlen, sharing), update, self.attention_backend)
        x, rest = None, (rotary, positions, documents, self.attention_backend)
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                update, x = checkpoint(block, update, x, *rest, use_reentrant=False, context_fn=keep_attention)
            else:
                update, x = block(update, x, *rest)
        return add_norm(update, x, self.norm, self.config.norm_eps)[0]

    def stream_and_head(self, tokens: Tensor, **packed) -> tuple[Tensor, Tensor]:
        """Hidden states (B * T, D) of tokens (B, T), and the head's weight, whose gradient a tied embedding adds its own to."""
        if not self.config.tie_embeddings:
            return self(tokens, **packed).flatten(0, 1), self.head
        update, head = kernels.tied_embedding(tokens, self.embedding)
        return self.stream(update, **packed).flatten(0, 1), head

    def logits(self, tokens: Tensor, **packed) -> Tensor:
        """Logits (B, T, vocab_size) of tokens (B, T)."""
        return F.linear(self(tokens, **packed), self.head_weight[: self.config.vocab_size])

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        z_loss: float = 0.0,
        shortlist: Tensor | None = None,
        raised: Tensor | None = None,
        max_counted: int | None = None,
        **packed,
    ) -> Tensor:
        """Sum over the counted positions of -log p(target), nats, fp32: tokens, targets (B, T), -100 where not counted.

        With z_loss, plus z_loss * logsumexp(logits)^2 at each of them (PaLM, section 5). With a shortlist of
        token ids (C,) the softmax is over these, with raised (C,) added to their logits, and targets index the shortlist.
        max_counted: the caller's promise that no more targets count, so that on a GPU the others cost no matmul.
        """
        h, head = self.stream_and_head(tokens, **packed)
        size = self.config.vocab_size
        if shortlist is not None:
            head, size = kernels.embedding(shortlist, head), len(shortlist)
        return kernels.linear_cross_entropy(
            h, head, targets.flatten(), bias=raised, reduction="sum", z_loss=z_loss, vocab_size=size, max_counted=max_counted
        )

    def logprobs(self, tokens: Tensor, targets: Tensor, max_counted: int | None = None, **packed) -> Tensor:
        """log p(target) at each position, nats, fp32 (B, T), 0 where not counted: the arguments of loss()."""
        h, head = self.stream_and_head(tokens, **packed)
        return kernels.linear_logprobs(
            h, head, targets.flatten(), vocab_size=self.config.vocab_size, max_counted=max_counted,
            keep_bytes=self.keep_logits_bytes,
        ).view(targets.shape)  # fmt: skip


def keep_what_fits(model: Transformer, tokens: int, memory_bytes: int, itemsize: int) -> None:
    """Keep what the backward would otherwise compute again, where half of a GPU's memory has room for it.

    That is SwiGLU's product and, behind logprobs(), logits, beside 16 bytes a parameter and the activations of `tokens`
    tokens, itemsize bytes a number. Called once, before a step is compiled, with the GPU's whole memory: what is free at the
    moment would make one run differ from the next. Where activations are recomputed, memory is short.
    """
    c = model.config
    numbers = 4 * c.dim + 2 * (c.n_heads + c.n_kv_heads) * c.head_dim + 2 * c.ffn_dim  # of a token in a layer
    product = tokens * c.n_layers * c.ffn_dim * itemsize
    room = memory_bytes // 2 - 16 * count_parameters(c) - tokens * c.n_layers * numbers * itemsize
    keep = product <= room and not model.checkpoint_activations
    for block in cast(Iterable[Block], model.blocks):
        block.keep_product = keep
    model.keep_logits_bytes = max(0, room - product if keep else room)


@torch.no_grad()
def initialise(model: Transformer, seed: int, text: Tensor | None = None) -> None:
    """Fill every parameter, the same on every device.

    Embedding and head: N(0, 0.02^2), or with text (n,) int64 the tables of its bigram model (fastlm/bigram.py), which
    needs an untied head; the padding rows 0. Matrices that read the stream (qkv, gate_up): N(0, 1/fan_in).
    Matrices that write to it (out, down): 0, so that every block starts as the identity. Norm weights: 1. Biases: 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(weight: Tensor, std: float) -> None:
        weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=generator))

    for name, p in model.named_parameters():
        if name in ("embedding", "head"):
            normal(p, 0.02)
            p[model.config.vocab_size :] = 0  # the padding
        elif name.endswith("bias"):
            p.zero_()
        elif p.dim() == 1:
            p.fill_(1)
        elif name.endswith(("out.weight", "down.weight")):
            p.zero_()
        else:
            normal(p, p.shape[1] ** -0.5)
    if text is not None:
        c = model.config
        check(not c.tie_embeddings, "init bigram needs an untied head; pass --model.no-tie-embeddings, or --init normal")
        embedding, head = bigram_tables(text, c.vocab_size, c.dim, generator)
        model.embedding[: c.vocab_size], model.head[: c.vocab_size] = embedding, head


def build(config: ModelConfig, seed: int, device: torch.device, text: Tensor | None = None, **options) -> Transformer:
    """A freshly initialised model on the device; text as in initialise()."""
    model = Transformer(config, **options)
    initialise(model, seed, text)
    return model.to(device)


def count_parameters(config: ModelConfig) -> int:
    """Trainable parameters, the vocabulary's padding not counted."""
    c, head_dim = config, config.head_dim
    attention_ = c.dim * (c.n_heads + 2 * c.n_kv_heads) * head_dim + c.n_heads * head_dim * c.dim
    extras = (2 * head_dim if c.qk_norm else 0) + ((c.n_heads + 2 * c.n_kv_heads) * head_dim if c.qkv_bias else 0)
    block = attention_ + 3 * c.dim * c.ffn_dim + 2 * c.dim + extras
    return c.vocab_size * c.dim * (1 if c.tie_embeddings else 2) + c.n_layers * block + c.dim


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of one token's forward and backward pass, causal, recomputation not counted.

    6 per weight that takes part in a matmul (the head does, the embedding look-up does not; 2 forward, 4 backward), plus
    attention's two products over the (seq_len / 2) tokens that a token sees on average: 3 * 2 * 2 * (T / 2) * H * Dh
    per layer (PaLM, appendix B, halved for the causal mask).
    """
    c = config
    block = c.dim * (c.n_heads + 2 * c.n_kv_heads) * c.head_dim + c.n_heads * c.head_dim * c.dim + 3 * c.dim * c.ffn_dim
    weights = c.n_layers * block + c.vocab_size * c.dim
    return 6.0 * weights + c.n_layers * 6.0 * seq_len * c.n_heads * c.head_dim

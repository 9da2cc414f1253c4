"""Token ids to hidden states, logits, a loss or log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypedDict, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm import kernels
from fastlm.config import ModelConfig
from fastlm.kernels.attention import Documents, prepare
from fastlm.model.block import Block, Layout
from fastlm.model.layers import AddRMSNorm
from fastlm.model.memory import keep_attention
from fastlm.model.rotary import rotary_table


class Packed(TypedDict, total=False):
    """Where documents lie in packed rows; nothing of it for plain rows.

    positions (B, T) restart in each document; cu_seqlens, max_seqlen and sharing as in Documents.
    """

    positions: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    sharing: tuple[Tensor, Tensor, Tensor] | None


class Transformer(nn.Module):
    """Embedding, blocks, norm and head.

    The vocabulary is padded to a multiple of 64 inside; logits, losses and counts never show it.
    """

    cos: Tensor
    sin: Tensor
    cos_half: Tensor
    sin_half: Tensor

    def __init__(
        self,
        config: ModelConfig,
        checkpoint_activations: bool = False,
        attention_backend: str = "torch",
    ):
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        self.attention_backend = attention_backend
        self.keep_logits_bytes: int | None = None  # of logprobs(), for its backward pass
        vocabulary = (config.padded_vocab_size, config.dim)
        # no modules: the head's matmul is fused with the loss, and both may be one tensor
        self.embedding = nn.Parameter(torch.empty(vocabulary))
        if not config.tie_embeddings:
            self.head = nn.Parameter(torch.empty(vocabulary))
        self.norm = AddRMSNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # For 16-bit activations: half the bytes, and after their own rounding the same error (in
        # bf16 0.5% more, root mean square).
        self.register_buffer("cos_half", cos.half(), persistent=False)
        self.register_buffer("sin_half", sin.half(), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding if self.config.tie_embeddings else self.head

    def forward(self, tokens: Tensor, **packed: Unpack[Packed]) -> Tensor:
        """Hidden states after the last norm, (B, T, D), of tokens (B, T)."""
        return self.hidden(kernels.embedding(tokens, self.embedding), **packed)

    def hidden(self, embedded: Tensor, **packed: Unpack[Packed]) -> Tensor:
        """Hidden states after the last norm, (B, T, D), of the tokens' embeddings (B, T, D).

        Raises ValueError where cu_seqlens comes without max_seqlen.
        """
        device = embedded.device.type
        if torch.is_autocast_enabled(device):  # the residual stream has the matmuls' dtype
            embedded = embedded.to(torch.get_autocast_dtype(device))
        return self.run_blocks(embedded, self.layout(embedded, **packed))

    def layout(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sharing: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Layout:
        """The layout of activations x (B, T, D), made once for all blocks."""
        half = x.dtype.itemsize == 2
        cos, sin = (self.cos_half, self.sin_half) if half else (self.cos, self.sin)
        documents = None
        if cu_seqlens is not None:
            if max_seqlen is None:
                raise ValueError(
                    "cu_seqlens needs max_seqlen, the length of the longest document in tokens"
                )
            documents = Documents(cu_seqlens, max_seqlen, sharing)
            documents = prepare(documents, x, self.attention_backend)
        return Layout(cos, sin, positions, documents, self.attention_backend)

    def run_blocks(self, embedded: Tensor, layout: Layout) -> Tensor:
        """The blocks and the last norm: (B, T, D) to (B, T, D)."""
        update, x = embedded, None
        for block in cast(Iterable[Block], self.blocks):
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                update, x = checkpoint(
                    block, update, x, layout, use_reentrant=False, context_fn=keep_attention
                )
            else:
                update, x = block(update, x, layout)
        return self.norm(update, x)[0]

    def run(self, function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        """function(self, *args, **options), as a forward pass of this module.

        For a loss from outside: what gathers a sharded model before a pass, and adds up gradients
        behind it, knows this method by its name.
        """
        return function(self, *args, **options)

    def hidden_and_head(self, tokens: Tensor, **packed: Unpack[Packed]) -> tuple[Tensor, Tensor]:
        """Hidden states (B * T, D) of tokens (B, T), and the weight of the head.

        A tied embedding adds its gradient to the one that the head makes.
        """
        if not self.config.tie_embeddings:
            return self(tokens, **packed).flatten(0, 1), self.head
        embedded, head = kernels.tied_embedding(tokens, self.embedding)
        return self.hidden(embedded, **packed).flatten(0, 1), head

    def logits(self, tokens: Tensor, **packed: Unpack[Packed]) -> Tensor:
        """Logits (B, T, vocab_size) of tokens (B, T)."""
        return F.linear(self(tokens, **packed), self.head_weight[: self.config.vocab_size])

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        z_loss: float = 0.0,
        max_counted: int | None = None,
        **packed: Unpack[Packed],
    ) -> Tensor:
        """Sum of -log p(target) over the counted positions, nats, fp32.

        tokens, targets: (B, T), -100 where not counted. With z_loss, plus z_loss *
        logsumexp(logits)^2 at each of them (PaLM, Chowdhery et al. 2022, section 5). max_counted:
        the caller's promise that no more targets count, so that on a GPU the others cost no matmul.
        """
        h, head = self.hidden_and_head(tokens, **packed)
        return kernels.linear_cross_entropy(
            h,
            head,
            targets.flatten(),
            reduction="sum",
            z_loss=z_loss,
            vocab_size=self.config.vocab_size,
            max_counted=max_counted,
        )

    def logprobs(
        self,
        tokens: Tensor,
        targets: Tensor,
        max_counted: int | None = None,
        **packed: Unpack[Packed],
    ) -> Tensor:
        """log p(target), nats, fp32 (B, T), 0 where not counted: the arguments of loss()."""
        h, head = self.hidden_and_head(tokens, **packed)
        return kernels.linear_logprobs(
            h,
            head,
            targets.flatten(),
            vocab_size=self.config.vocab_size,
            max_counted=max_counted,
            keep_bytes=self.keep_logits_bytes,
        ).view(targets.shape)

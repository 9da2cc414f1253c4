"""What is trained, and how it is shared out over GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from fastlm.config import ModelConfig
from fastlm.model import count_parameters

ITEM = 2  # bytes of a number in bf16
FULL = 4  # bytes of a number in fp32


@dataclass(frozen=True)
class Work:
    """What one GPU does in an optimizer step: passes over rows x seq_len tokens each."""

    config: ModelConfig
    rows: int
    seq_len: int
    passes: int = 1  # forward and backward
    optimizer: str = "muon"
    recompute: bool = False  # activations are recomputed in the backward pass

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.rows * self.seq_len


@dataclass(frozen=True)
class Way:
    """The model's `copies` copies, each cut into `shards` parts of which a GPU holds one.

    one: a single GPU. ddp: every GPU has a copy (PyTorch's DistributedDataParallel). fsdp: all GPUs
    share one copy (fully_shard: Rajbhandari et al. 2020, "ZeRO", stage 3). hsdp: the GPUs of a
    machine share one.
    """

    mode: str
    shards: int
    copies: int
    per_node: int

    @property
    def gpus(self) -> int:
        return self.shards * self.copies

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


def ways(gpus: int, per_node: int) -> list[Way]:
    """The ways to share a model out over so many GPUs."""
    if gpus == 1:
        return [Way("one", 1, 1, per_node)]
    found = [Way("ddp", 1, gpus, per_node), Way("fsdp", gpus, 1, per_node)]
    if per_node > 1 and gpus > per_node and gpus % per_node == 0:
        found.append(Way("hsdp", per_node, gpus // per_node, per_node))
    return found


def matrices(c: ModelConfig) -> list[tuple[int, int]]:
    """Shapes of a block's weight matrices (outputs, inputs): qkv, out, gate_up, down."""
    heads = c.n_heads * c.head_dim
    qkv = heads + 2 * c.n_kv_heads * c.head_dim
    return [(qkv, c.dim), (c.dim, heads), (2 * c.ffn_dim, c.dim), (c.dim, c.ffn_dim)]


def hidden_parameters(c: ModelConfig) -> int:
    """Numbers in all blocks' matrices: those that Muon updates."""
    return c.n_layers * sum(m * n for m, n in matrices(c))


def stored_parameters(c: ModelConfig) -> int:
    """Numbers that a training run stores: count_parameters() and the rows that pad the
    vocabulary.
    """
    padding = (c.padded_vocab_size - c.vocab_size) * c.dim
    return count_parameters(c) + padding * (1 if c.tie_embeddings else 2)

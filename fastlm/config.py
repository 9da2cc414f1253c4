"""Configuration: frozen dataclasses of plain values, and the presets. Each checks itself when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from fastlm.errors import UserError

VOCAB_MULTIPLE = 64  # matmul tiles are whole when the padded vocabulary is a multiple of this


def check(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama-style decoder: RMSNorm, RoPE (half-rotation), grouped-query attention, SwiGLU, no biases."""

    vocab_size: int = 50257
    """Number of tokens the model knows (padded to a multiple of 64 inside, never visible outside)."""
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
    """How a model was stretched to longer texts: linear divides all positions by rope_factor; llama3 only long waves."""
    rope_factor: float = 1.0
    """By how much the context was stretched."""
    rope_low_freq_factor: float = 1.0
    """llama3: waves longer than rope_original_len / this are divided in full."""
    rope_high_freq_factor: float = 4.0
    """llama3: waves shorter than rope_original_len / this stay as they are."""
    rope_original_len: int = 8192
    """llama3: the context before stretching, tokens."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len"):
            value = getattr(self, name)
            check(value > 0, f"model.{name} is {value}; it must be a positive integer")
        check(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}; it must be positive")
        check(self.norm_eps > 0, f"model.norm_eps is {self.norm_eps}; it must be positive")
        check(
            self.head_width > 0 or self.dim % self.n_heads == 0,
            f"model.n_heads is {self.n_heads}, which does not divide model.dim {self.dim}; "
            f"choose n_heads among {divisors(self.dim)}",
        )
        check(
            self.n_heads % self.n_kv_heads == 0,
            f"model.n_kv_heads is {self.n_kv_heads}, which does not divide model.n_heads {self.n_heads}; "
            f"choose n_kv_heads among {divisors(self.n_heads)}",
        )
        check(self.head_width >= 0, f"model.head_width is {self.head_width}; it must not be negative")
        check(
            self.head_dim % 2 == 0,
            f"a head has {self.head_dim} channels; RoPE rotates pairs, so it must be even: change model.n_heads",
        )
        check(self.rope_factor > 0, f"model.rope_factor is {self.rope_factor}; it must be positive")

    @property
    def head_dim(self) -> int:
        return self.head_width or self.dim // self.n_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


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
        dim=192, n_layers=4, n_heads=3, n_kv_heads=3, ffn_dim=512, max_seq_len=256, tie_embeddings=False, qk_norm=True
    ),
    # for tests
    "tiny": ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=192, max_seq_len=256),
}


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the hidden matrices, AdamW for embedding, head and norms; adamw: AdamW for all."""
    lr: float = 0.003
    """Peak learning rate of the hidden matrices (an update has AdamW's size under muon too)."""
    embedding_lr: float = 0.002
    """Peak learning rate of the embedding and the norms; of the head too where it is tied."""
    head_lr: float = 0.002
    """Peak learning rate of an untied head."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices (norm weights have none)."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    momentum: float = 0.95
    """Muon's momentum."""
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    """wsd: warm up, stay, then fall linearly over the last decay_fraction; cosine and linear fall from the warm-up on."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from 0."""
    decay_fraction: float = 0.5
    """Share of all steps over which wsd falls to min_lr_fraction."""
    min_lr_fraction: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr", "head_lr"):
            value = getattr(self, name)
            check(value > 0, f"optim.{name} is {value}; it must be positive")
        for name in ("weight_decay", "warmup_steps", "min_lr_fraction", "clip_norm"):
            value = getattr(self, name)
            check(value >= 0, f"optim.{name} is {value}; it must not be negative")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optim.{name} is {value}; it must lie in [0, 1)")
        check(0 < self.decay_fraction <= 1, f"optim.decay_fraction is {self.decay_fraction}; it must lie in (0, 1]")


TUNING = OptimConfig(name="adamw", lr=2e-5, embedding_lr=2e-5, head_lr=2e-5, weight_decay=0.0, beta2=0.999, schedule="linear")


@dataclass(frozen=True)
class StageConfig:
    """What every training stage has; the one base class here, so that the fields below are written once and not in each."""

    recipe: str = "demo"
    """Where the defaults come from: a shipped recipe or a .toml file."""
    out: str = ""
    """Run folder (default: one under runs/, named after the stage); it must not hold another run."""
    resume: str = ""
    """Run folder to go on with; its own configuration is used, and only --steps and the logging options may change."""
    cache: str = ""
    """Where tokenised data is kept (default: the user's cache folder)."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do about rows of data that cannot be read: stop, or count and skip them."""
    steps: int = 150
    """Optimizer steps."""
    batch_rows: int = 8
    """Rows per optimizer step."""
    micro_batch_rows: int = 0
    """Rows per forward and backward pass of a process; 0 means its whole share of batch_rows (no gradient accumulation)."""
    seed: int = 0
    """Seed of the initialisation and of the data order."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_activations: bool = False
    """Recompute each block's activations in the backward pass: less memory, a third more compute."""
    validate_every: int = 50
    """Steps between validations (0: only at the end)."""
    checkpoint_every: int = 50
    """Steps between checkpoints (0: only at the end)."""
    keep_checkpoints: int = 2
    """Most recent checkpoints kept, beside the best one."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder too."""
    device: str = "auto"
    """auto (cuda when there is one), cpu, cuda or cuda:N."""
    attention: Literal["auto", "torch", "flash", "flash3", "flash4", "xformers"] = "auto"
    """Attention backend; fastlm doctor prints what auto chooses and why."""
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("batch_rows", "keep_checkpoints"):
            value = getattr(self, name)
            check(value > 0, f"{name} is {value}; it must be a positive integer")
        for name in ("micro_batch_rows", "validate_every", "checkpoint_every", "seed"):
            value = getattr(self, name)
            check(value >= 0, f"{name} is {value}; it must not be negative")
        check(
            self.batch_rows % self.micro_rows == 0,
            f"micro_batch_rows is {self.micro_rows}, which does not divide batch_rows {self.batch_rows}; "
            f"choose it among {divisors(self.batch_rows)}",
        )

    @property
    def micro_rows(self) -> int:
        return self.micro_batch_rows or self.batch_rows


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """Train a language model from scratch on text."""

    preset: str = "demo"
    """Model shape; single fields can be overridden with --model.FIELD."""
    data: str = "python-stdlib"
    """Text: python-stdlib, a .txt/.jsonl/.parquet file or folder, a hub data set (wikitext-103, org/name), or a mixture."""
    tokenizer: str = "gpt2"
    """gpt2, or a Hugging Face tokenizer.json (or the folder that holds one)."""
    seq_len: int = 256
    """Tokens per row."""
    isolate_documents: bool = False
    """Attention and positions stay within a document; the first token of each is not a target."""
    init: Literal["normal", "bigram", "auto"] = "normal"
    """normal: random embedding and head; bigram: of the text's bigram model (needs an untied head); auto: bigram if untied."""
    shortlist: int = 0
    """Train with a softmax over the so many most frequent tokens, the targets and random others (0: the whole vocabulary)."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition added to the loss (0: none)."""
    validation_tokens: int = 1_000_000
    """At most this many validation tokens are scored, from the start of the split."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["demo"])

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "seq_len", "validation_tokens"):
            value = getattr(self, name)
            check(value > 0, f"{name} is {value}; it must be a positive integer")
        for name in ("shortlist", "z_loss"):
            value = getattr(self, name)
            check(value >= 0, f"{name} is {value}; it must not be negative")
        check(
            self.seq_len <= self.model.max_seq_len,
            f"seq_len is {self.seq_len}, but model.max_seq_len is {self.model.max_seq_len}; "
            f"shorten seq_len or pass --model.max-seq-len {self.seq_len}",
        )


@dataclass(frozen=True)
class TuningConfig(StageConfig):
    """What fine-tuning on examples has beside that."""

    model: str = ""
    """Run, checkpoint or Hugging Face folder to start from."""
    data: str = ""
    """Rows: a .jsonl, .json or .parquet file or folder, a hub data set (alpaca, hh-rlhf, org/name), or python-functions."""
    recipe: str = ""
    """Where the defaults come from: a shipped recipe or a .toml file (default: none)."""
    tokenizer: str = ""
    """gpt2 or a tokenizer.json, where it is not the model's own."""
    template: str = "auto"
    """How dialogues become text: auto (by the rows' form), chatml, alpaca, tokenizer (its own), none, or a Jinja file."""
    steps: int = 0
    """Optimizer steps (0: as many as the epochs need)."""
    epochs: float = 1.0
    """Passes over the data, where steps is 0."""
    max_len: int = 0
    """Longest example, tokens (0: the model's, at most 512); of a longer one the prompt's start goes first, then the end."""
    row_len: int = 0
    """Tokens per row, into which examples are packed (0: max_len; for pairs 4 max_len)."""
    held_out: float = 0.05
    """Share of the examples held out for validation, where the data has no validation split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.steps >= 0, f"steps is {self.steps}; it must not be negative")
        check(self.epochs > 0, f"epochs is {self.epochs}; it must be positive")
        check(self.max_len >= 0, f"max_len is {self.max_len}; it must not be negative")
        check(self.row_len == 0 or self.row_len >= self.max_len,
              f"row_len is {self.row_len}, shorter than max_len {self.max_len}; lengthen it, or leave it 0")  # fmt: skip
        check(0 <= self.held_out < 1, f"held_out is {self.held_out}; it must lie in [0, 1)")


@dataclass(frozen=True)
class SftConfig(TuningConfig):
    """Teach a model to answer: supervised fine-tuning on instructions; the loss counts the responses and their end."""

    optim: OptimConfig = field(default_factory=lambda: TUNING)


@dataclass(frozen=True)
class DpoConfig(TuningConfig):
    """Teach a model which of two answers is preferred: direct preference optimization and its relatives."""

    loss: str = "sigmoid"
    """sigmoid: DPO; ipo: a squared margin; length-normalised: DPO of log-probabilities per token; simpo: that, no reference;
    or another of fastlm.train.losses."""
    beta: float = 0.1
    """How strongly the policy is held to the reference (simpo: scale of the reward, usually 2 to 10)."""
    label_smoothing: float = 0.0
    """Share of the preferences taken to be the wrong way round (conservative DPO); sigmoid and length-normalised only."""
    margin: float = 0.5
    """simpo: by how much the chosen answer's reward shall exceed the other's."""
    share_prompt: bool = True
    """Compute the prompt once for both answers; the result is the same."""
    optim: OptimConfig = field(default_factory=lambda: dataclasses.replace(TUNING, lr=2e-6, embedding_lr=2e-6, head_lr=2e-6))

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.beta > 0, f"beta is {self.beta}; it must be positive")
        check(0 <= self.label_smoothing < 0.5, f"label_smoothing is {self.label_smoothing}; it must lie in [0, 0.5)")

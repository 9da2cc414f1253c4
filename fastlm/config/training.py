"""Options of the training stages. Each class checks itself when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from fastlm.config.checks import check_not_negative, check_positive
from fastlm.config.model import PRESETS, ModelConfig
from fastlm.errors import check, divisors


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the hidden matrices and AdamW for the rest; adamw: AdamW for all."""
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
    """wsd: warm up, stay, then fall linearly over the last decay_fraction; cosine and linear fall
    from the warm-up on."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises from 0."""
    decay_fraction: float = 0.5
    """Share of all steps over which wsd falls to min_lr_fraction."""
    min_lr_fraction: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "embedding_lr", "head_lr", table="optim.")
        not_negative = ("weight_decay", "warmup_steps", "min_lr_fraction", "clip_norm")
        check_not_negative(self, *not_negative, table="optim.")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optim.{name} is {value}; it must lie in [0, 1)")
        check(
            0 < self.decay_fraction <= 1,
            f"optim.decay_fraction is {self.decay_fraction}; it must lie in (0, 1]",
        )


TUNING = OptimConfig(
    name="adamw",
    lr=2e-5,
    embedding_lr=2e-5,
    head_lr=2e-5,
    weight_decay=0.0,
    beta2=0.999,
    schedule="linear",
)


@dataclass(frozen=True)
class StageConfig:
    """Options of every training stage.

    A base class, so that a field is written once and yet stays a plain key of config.toml and a
    plain --flag of each stage; a table of its own would give it another name in both.
    """

    recipe: str = "demo"
    """Where the defaults come from: a shipped recipe or a .toml file."""
    out: str = ""
    """Run folder, which must not hold another run (default: runs/STAGE-NAME, numbered)."""
    resume: str = ""
    """Run folder to go on with, with its own configuration; only its length, where it runs and what
    it records may change."""
    cache: str = ""
    """Where tokenised data is kept (default: the user's cache folder)."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do about rows of data that cannot be read: stop, or count and skip them."""
    steps: int = 150
    """Optimizer steps."""
    batch_rows: int = 8
    """Rows per optimizer step."""
    micro_batch_rows: int = 0
    """Rows per forward and backward pass of a process; 0 means its whole share of batch_rows (no
    gradient accumulation)."""
    seed: int = 0
    """Seed of the initialisation and of the data order."""
    compile: bool = False
    """Compile the model with torch.compile."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
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
    deterministic: bool = False
    """On a GPU, the same bits on every run, as on a CPU anyway: sums are added up in a fixed order
    and torch.compile measures nothing, which is slower."""
    attention: Literal["auto", "torch", "flash", "flash3", "flash4", "xformers"] = "auto"
    """Attention backend; fastlm doctor prints what auto chooses and why."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """Under torchrun: each process holds the whole model (ddp), its part (fsdp), or its part of the
    machine's (hsdp); auto: ddp where it fits."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: free a block after its forward pass and gather it again for the backward pass."""
    timeout_minutes: float = 10.0
    """Under torchrun: how long a process waits for another one before the run ends."""
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        check_positive(self, "batch_rows", "keep_checkpoints", "timeout_minutes")
        check_not_negative(self, "micro_batch_rows", "validate_every", "checkpoint_every", "seed")
        check(
            self.batch_rows % self.micro_rows == 0,
            f"micro_batch_rows is {self.micro_rows}, which does not divide "
            f"batch_rows {self.batch_rows}; choose it among {divisors(self.batch_rows)}",
        )

    @property
    def micro_rows(self) -> int:
        """Rows of one pass, if one process makes the whole step."""
        return self.micro_batch_rows or self.batch_rows


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """Train a language model from scratch on text."""

    preset: str = "demo"
    """Model shape; single fields can be overridden with --model.FIELD."""
    data: str = "python-stdlib"
    """Text: python-stdlib, a .txt/.jsonl/.parquet file or folder, a hub data set (wikitext-103,
    org/name), or a mixture. A folder's train/, validation/ and test/ are splits; test is not
    read."""
    tokenizer: str = "gpt2"
    """gpt2, or a Hugging Face tokenizer.json (or the folder that holds one)."""
    seq_len: int = 256
    """Tokens per row."""
    isolate_documents: bool = False
    """Attention and positions stay within a document; the first token of each is not a target."""
    init: Literal["normal", "bigram", "auto"] = "normal"
    """normal: random embedding and head; bigram: of the text's bigram model (needs an untied head);
    auto: bigram if untied."""
    shortlist: int = 0
    """Train with a softmax over the so many most frequent tokens, the targets and random others (0:
    the whole vocabulary)."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition added to the loss (0: none)."""
    validation_tokens: int = 1_000_000
    """At most this many validation tokens are scored, from the start of the split."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["demo"])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps", "seq_len", "validation_tokens")
        check_not_negative(self, "shortlist", "z_loss")
        check(
            self.seq_len <= self.model.max_seq_len,
            f"seq_len is {self.seq_len}, but model.max_seq_len is {self.model.max_seq_len}; "
            f"shorten seq_len or pass --model.max-seq-len {self.seq_len}",
        )


@dataclass(frozen=True)
class TuningConfig(StageConfig):
    """Options of fine-tuning on examples."""

    model: str = ""
    """Run, checkpoint or Hugging Face folder to start from."""
    data: str = ""
    """Examples: a .jsonl, .json or .parquet file or folder, a hub data set (alpaca, hh-rlhf,
    org/name), or python-functions."""
    recipe: str = ""
    """Where the defaults come from: a shipped recipe or a .toml file (default: none)."""
    tokenizer: str = ""
    """gpt2 or a tokenizer.json, where it is not the model's own."""
    template: str = "auto"
    """How dialogues become text: auto (by the rows' form), chatml, alpaca, tokenizer (its own),
    none, or a Jinja file."""
    steps: int = 0
    """Optimizer steps (0: as many as the epochs need)."""
    epochs: float = 1.0
    """Passes over the data, where steps is 0."""
    max_len: int = 0
    """Longest example, tokens (0: the model's, at most 512); of a longer one the prompt's start
    goes first, then the end."""
    row_len: int = 0
    """Tokens per row, into which examples are packed (0: max_len; for pairs 4 max_len)."""
    held_out: float = 0.05
    """Share of the examples held out for validation, where the data has no validation split (a test
    split is never used)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "epochs")
        check_not_negative(self, "steps", "max_len")
        check(
            self.row_len == 0 or self.row_len >= self.max_len,
            f"row_len is {self.row_len}, shorter than max_len {self.max_len}; "
            f"lengthen it, or leave it 0",
        )
        check(0 <= self.held_out < 1, f"held_out is {self.held_out}; it must lie in [0, 1)")


@dataclass(frozen=True)
class SftConfig(TuningConfig):
    """Teach a model to answer: supervised fine-tuning on instructions.

    The loss counts the responses and their end.
    """

    optim: OptimConfig = field(default_factory=lambda: TUNING)


@dataclass(frozen=True)
class DpoConfig(TuningConfig):
    """Teach a model which of two answers is preferred: DPO, IPO, SimPO."""

    loss: str = "sigmoid"
    """sigmoid: DPO; ipo: a squared margin; length-normalised: DPO of log-probabilities per token;
    simpo: that, no reference; or another of fastlm.train.losses."""
    beta: float = 0.1
    """How strongly the policy is held to the reference (simpo: scale of the reward, 2 to 10)."""
    label_smoothing: float = 0.0
    """Share of the preferences taken to be the wrong way round (conservative DPO); sigmoid and
    length-normalised only."""
    margin: float = 0.5
    """simpo: by how much the chosen answer's reward shall exceed the other's."""
    share_prompt: bool = True
    """Compute the prompt once for both answers; the result is the same."""
    optim: OptimConfig = field(
        default_factory=lambda: dataclasses.replace(
            TUNING, lr=2e-6, embedding_lr=2e-6, head_lr=2e-6
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "beta")
        check(
            0 <= self.label_smoothing < 0.5,
            f"label_smoothing is {self.label_smoothing}; it must lie in [0, 0.5)",
        )

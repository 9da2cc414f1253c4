"""Options of the commands that use a model, prepare data, or look at the machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from fastlm.config.checks import check_not_negative, check_positive
from fastlm.config.training import DpoConfig, PretrainConfig, SftConfig
from fastlm.errors import check


@dataclass(frozen=True)
class Sampling:
    """Options of sampling: how the next token is chosen from the model's logits."""

    temperature: float = 1.0
    """Sharpness of the choice: 0 takes the likeliest token, 1 samples from the model as it is."""
    top_k: int = 0
    """Sample among so many of the likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Sample among the likeliest tokens whose probability adds up to this."""
    min_p: float = 0.0
    """Sample among tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the text holds already are divided by this (1: none)."""

    def __post_init__(self) -> None:
        check_not_negative(self, "temperature", "top_k")
        check_positive(self, "repetition_penalty")
        check(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie in (0, 1]")
        check(0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must lie in [0, 1]")


@dataclass(frozen=True)
class WritingConfig(Sampling):
    """Options of writing with a model.

    A subclass of Sampling, so that the options are plain flags and sampling takes them as they are.
    """

    model: str = ""
    """Run folder, checkpoint folder or Hugging Face folder."""
    tokens: int = 128
    """At most so many tokens are written (in a dialogue: an answer)."""
    top_p: float = 0.95
    """Sample among the likeliest tokens whose probability adds up to this."""
    seed: int = 0
    """The same seed and the same words bring the same text."""
    tokenizer: str = ""
    """gpt2 or a tokenizer.json, where it is not the model's own."""
    device: str = "auto"
    """auto (cuda when there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "tokens")


@dataclass(frozen=True)
class GenerateConfig(WritingConfig):
    """Continue prompts with a trained model."""

    prompt: tuple[str, ...] = ("\n",)
    """Text to continue; given several times, all of them at once."""
    stop: tuple[str, ...] = ()
    """Stop before this text; may be given several times."""
    json: bool = False
    """Print JSON: the prompts with their texts."""


@dataclass(frozen=True)
class ChatConfig(WritingConfig):
    """Talk to a model in the terminal."""

    system: str = ""
    """Instruction that stands before the dialogue."""
    template: str = "auto"
    """Chat template: the model's own where it has one, else ChatML (auto); chatml, alpaca,
    tokenizer or a Jinja file."""
    tokens: int = 512
    """At most so many tokens an answer."""
    temperature: float = 0.7
    """Sharpness of the choice: 0 takes the likeliest token, 1 samples from the model as it is."""
    repetition_penalty: float = 1.1
    """Logits of tokens that the dialogue holds already are divided by this (1: none)."""


@dataclass(frozen=True)
class EvalConfig:
    """Score models on a text: perplexity by every protocol people use."""

    models: str = ""
    """Run folders, checkpoint folders or Hugging Face folders; several are separated by commas or
    spaces."""
    data: str = "wikitext-2"
    """Text: python-stdlib, a local file or folder, or a hub data set."""
    split: str = ""
    """Which split of the text (default: validation, else test, else all of it)."""
    protocols: str = ""
    """Default: all that apply. window: 1024 tokens side by side; stride: 1024 every 512; line: 100
    lines; word: as lm-eval."""
    tokenizer: str = ""
    """gpt2 or a tokenizer.json, where it is not the model's own."""
    max_documents: int = 0
    """Score only the first so many documents (0: all)."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What a record without a text does: end the command, or be left out."""
    batch_tokens: int = 0
    """Tokens per forward pass (0: 4,096 on a CPU, 131,072 on a GPU)."""
    compile: bool = False
    """Compile the model with torch.compile: worth it for a long text."""
    tf32: bool = False
    """On a GPU, multiply in TF32: several times as fast, with inputs rounded to 10 bits of
    mantissa."""
    json: bool = False
    """Print JSON instead of a table."""
    device: str = "auto"
    """auto (cuda when there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        check_not_negative(self, "max_documents", "batch_tokens")


@dataclass(frozen=True)
class LmEvalConfig:
    """Run lm-eval's tasks with a model."""

    model: str = ""
    """Run folder, checkpoint folder or Hugging Face folder."""
    arguments: tuple[str, ...] = ()
    """Everything after the model: lm-eval's own options, such as --tasks."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as a Hugging Face folder."""

    model: str = ""
    """Run folder or checkpoint folder."""
    to: str = ""
    """The new folder."""
    template: str = "auto"
    """Chat template to write: the one that the model was taught (auto), chatml, alpaca, tokenizer,
    none, or a Jinja file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; float32 keeps every bit."""
    tokenizer: str = ""
    """gpt2 or a tokenizer.json, where it is not the model's own."""


@dataclass(frozen=True)
class ImportConfig:
    """Make a Hugging Face folder of the Llama family a run."""

    model: str = ""
    """The Hugging Face folder."""
    to: str = ""
    """The new run folder."""
    tokenizer: str = ""
    """gpt2 or a tokenizer.json, where it is not the model's own."""


@dataclass(frozen=True)
class DataPrepareConfig:
    """Tokenise text into a folder, to train from it later."""

    sources: tuple[str, ...] = ()
    """python-stdlib, a file or folder, or a hub data set; several make a mixture."""
    out: str = ""
    """Folder to write (with several sources: one folder inside it for each)."""
    tokenizer: str = "gpt2"
    """gpt2, or a Hugging Face tokenizer.json (or the folder that holds one)."""
    text_field: str = "text"
    """Column of the text in .jsonl and .parquet rows."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do about rows that cannot be read: stop, or count and skip them."""
    dedup: Literal["none", "exact", "near"] = "none"
    """Drop documents that stand there twice: exact ones, or near ones too."""
    workers: int = 0
    """Threads that tokenise (0: one per core)."""

    def __post_init__(self) -> None:
        check_not_negative(self, "workers")


@dataclass(frozen=True)
class DataInspectConfig:
    """Show what a prepared folder holds, and check every hash."""

    folder: str = ""
    """A folder that fastlm data prepare wrote."""
    documents: int = 3
    """Decoded documents to show of each split."""
    picture: str = ""
    """Write the histogram of document lengths as this .svg file too."""

    def __post_init__(self) -> None:
        check_not_negative(self, "documents")


@dataclass(frozen=True)
class PlanConfig:
    """What training a model takes on so many GPUs: memory, time, communication, failures, energy.

    Arithmetic, not a measurement; docs/scaling.md has the formulas.
    """

    model: str = "modern-253m"
    """A recipe of pretraining (shipped, or a .toml file), or a model's preset."""
    gpus: str = "1,8,64,1024"
    """Numbers of GPUs, separated by commas."""
    gpu: str = "h100"
    """Which GPU: a100, h100, h200, b200."""
    gpus_per_node: int = 8
    """GPUs in a machine."""
    tokens: float = 1e12
    """Tokens of the whole run."""
    batch_rows: int = 0
    """Rows of an optimizer step, of all GPUs together (0: the recipe's batch_rows for each GPU)."""
    micro_batch_rows: int = 0
    """Rows of a GPU's forward and backward pass (0: the recipe's)."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass, whatever the recipe says."""
    write_gb_s: float = 2.0
    """GB a second that a machine writes of its checkpoints."""
    chart: str = ""
    """Write tokens a day by GPUs as this .svg file too."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        check_positive(self, "gpus_per_node", "tokens", "write_gb_s")
        check_not_negative(self, "batch_rows", "micro_batch_rows")
        check(
            self.chart == "" or self.chart.endswith(".svg"),
            f"chart is {self.chart!r}; it must end with .svg",
        )
        for count in self.gpus.split(","):
            good = re.fullmatch(r"\s*0*[1-9][0-9]{0,8}\s*", count, flags=re.ASCII)
            expected = "positive integers below 1,000,000,000, separated by commas"
            check(bool(good), f"gpus is {self.gpus!r}; it must be {expected}")

    @property
    def gpu_counts(self) -> list[int]:
        return [int(count) for count in self.gpus.split(",")]


@dataclass(frozen=True)
class KernelsConfig:
    """What the Triton kernels compile to, move and would take at least, counted without a GPU."""

    targets: str = ""
    """Architectures, separated by commas: sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942
    (default: all)."""
    against: Literal["", "liger"] = ""
    """Count Liger-Kernel's kernels too, where it is installed."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class ReportConfig:
    """Write runs as one page: curves, samples and figures, for a browser."""

    runs: tuple[str, ...] = ()
    """Folders of runs, or of a pipeline; several are laid over one another."""
    out: str = ""
    """The page (default: report.html in the folder, of several runs here); the same in Markdown is
    written beside it."""
    data: str = ""
    """Text to score the models on (default: that of the first run, else python-stdlib)."""
    scores: bool = True
    """Load each model, score it on the beginning of held-out text, and write samples."""
    device: str = "auto"
    """auto (cuda when there is one), cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class WatchConfig:
    """Follow runs in a browser: their report without samples, made anew as they go on."""

    runs: tuple[str, ...] = ()
    """Folders of runs, or of a pipeline; several are laid over one another."""
    port: int = 8642
    """Port of the page."""
    host: str = "127.0.0.1"
    """Address of this machine that the page is served at; any but the default lets others see
    it."""

    def __post_init__(self) -> None:
        check(0 <= self.port < 65536, f"port is {self.port}; it must lie in [0, 65535]")


@dataclass(frozen=True)
class PipelineConfig:
    """Pretrain, SFT, DPO, and the evaluation of each.

    The same command again goes on where it stopped.
    """

    recipe: str = "demo"
    """Where the defaults come from: a shipped recipe or a .toml file with the tables pretrain, sft,
    dpo and eval."""
    out: str = ""
    """Folder of the three runs (default: runs/pipeline-RECIPE)."""
    baseline: str = ""
    """A model to compare with: a run or a Hugging Face folder (default: the pretrained one)."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True)
class DoctorConfig:
    """Show what runs on this machine, for every operation, and why."""

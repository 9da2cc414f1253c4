"""A training stage of fastlm, run as its command runs it, and watched from the outside.

The stage's own function is called (pretrain, sft or dpo), with its loop, monitor, prefetched
batches, clipping and optimizers. Its loop asks an iterator for each step's batches; here that
iterator also notes the time, counts what was compiled and where the host waited for the GPU, and
ends the run when enough steps were seen. Nothing else of the loop is touched.

Text: the standard library's sources through fastlm's data path, by the word tokenizer of words.py
in GPT-2's place, which needs a package that a rented GPU may not have.

Three sizes: the real one on a GPU; on the stand-in for a GPU and on a CPU a small one, as a
rehearsal. On a CPU the kernels run in Triton's interpreter and torch.compile leaves the code
generation out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bench.harness.gpu_timing import device, energy_meter, on_gpu, rehearsing
from bench.harness.stand_ins import stand_in
from bench.harness.words import word_tokenizer

STOOD_IN = stand_in()  # before fastlm's loop is imported, which wants these packages

from fastlm import monitor  # noqa: E402
from fastlm.config import PRESETS, ModelConfig, OptimConfig, PretrainConfig  # noqa: E402
from fastlm.data.catalogue import open_source  # noqa: E402
from fastlm.data.text.documents import SEPARATOR, read_pieces  # noqa: E402
from fastlm.kernels.common import triton_on_cpu  # noqa: E402
from fastlm.runtime import ceiling  # noqa: E402
from fastlm.train import loop  # noqa: E402
from fastlm.train.pretrain import pretrain  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "gpu"  # tokenised text
FIRST_QUIET = (
    2  # the steps before it may compile and warm up; from it on nothing may make the host wait
)


@dataclass(frozen=True)
class Size:
    """What is measured: a model, a step of rows x seq_len tokens, and how many steps."""

    name: str
    model: ModelConfig
    rows: int
    seq_len: int
    steps: int  # of the run that gives the loss curve
    few_steps: int  # of each contender
    warmup: int  # steps that are not timed
    text: str
    examples: str  # of instructions and preferences

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def case(self) -> str:
        return f"{self.name}, {self.rows} x {self.seq_len}"


def size(measuring: bool) -> Size:
    """The real size where a GPU is to be measured, else one for a rehearsal."""
    if measuring and not rehearsing():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        rows = 32 if gib > 70 else 8 if gib > 20 else 2
        model = PRESETS["modern-253m"]
        data = ("python-stdlib", "python-functions")
        return Size("modern-253m", model, rows, 1024, 300, 30, 10, *data)
    data = (small_text(), small_examples())
    if on_gpu():
        return Size("tiny", PRESETS["tiny"], 4, 128, 20, 10, 6, *data)
    model = ModelConfig(
        vocab_size=320, dim=32, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=64, max_seq_len=32
    )
    return Size("one small layer", model, 2, 16, 6, 5, 3, *data)


def kept(name: str, text: str) -> str:
    """A file of this text beside the other data."""
    file = CACHE / name
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return str(file)


def small_text() -> str:
    """A file with the sources of a few modules."""
    modules = (contextlib, dataclasses, inspect, statistics, tempfile, warnings)
    return kept("small.txt", SEPARATOR.join(inspect.getsource(module) for module in modules))


def small_examples() -> str:
    """A file of instructions and preferences: what follows a line of a module, or does not."""
    lines = [line for line in inspect.getsource(statistics).splitlines() if line.strip()]
    records = []
    for at in range(0, 200, 5):
        prompt, *answer = lines[at : at + 4]
        right = "\n".join(answer)
        wrong = f"{answer[-1]}?"
        records.append({"prompt": prompt, "completion": right, "chosen": right, "rejected": wrong})
    return kept("small.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def pretrain_config(s: Size, run: Path, **options: Any) -> PretrainConfig:
    """The recipe modern-253m in so few steps, without validations and checkpoints on the way."""
    defaults: dict[str, Any] = {
        "recipe": "modern-253m",
        "preset": s.name,
        "model": s.model,
        "data": s.text,
        "batch_rows": s.rows,
        "seq_len": s.seq_len,
        "steps": s.steps,
        "compile": True,
        "validate_every": 0,
        "checkpoint_every": 0,
        "validation_tokens": 4 * s.tokens,
        "cache": str(CACHE),
        "out": str(run),
        "optim": OptimConfig(
            lr=0.002,
            embedding_lr=0.002,
            weight_decay=0.1,
            warmup_steps=s.warmup,
            decay_fraction=0.4,
        ),
    }
    return PretrainConfig(**(defaults | options))


@dataclass
class Seen:
    """What was seen of a run. Times lie between the starts of neighbouring steps."""

    milliseconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # of each timed step
    pairs: list[int] = field(default_factory=list)
    waits: Counter[str] = field(
        default_factory=Counter
    )  # file:line where the host waited for the GPU
    compiled_late: int = 0  # graphs compiled after the first step
    peak_gib: float = 0.0
    joules: float | None = None  # of the timed steps
    seconds: float = 0.0  # of the whole stage, from its call to its end
    attention: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the run's own lines

    def figures(self, flops_per_token: float) -> dict[str, float]:
        """Tokens per second by the median step, and what follows from them."""
        each = statistics.mean(self.tokens)
        rate = 1e3 * each / statistics.median(self.milliseconds)
        found = {"tokens_per_second": rate, "peak_gib": self.peak_gib}
        if on_gpu():
            peak, name = ceiling(device())
            if name == "MFU":
                found["mfu"] = rate * flops_per_token / peak
        if self.pairs:
            found["pairs_per_second"] = rate / each * statistics.mean(self.pairs)
        if self.joules is not None:
            found["joules_per_token"] = self.joules / sum(self.tokens)
        return found | {"waits": sum(self.waits.values()), "compiled_late": self.compiled_late}

    def fields(self, s: Size) -> dict[str, Any]:
        """What a row says beside its figures."""
        found: dict[str, Any] = {"attention": self.attention, "shape": s.case}
        if STOOD_IN:
            found["stand_ins"] = list(STOOD_IN)
        if on_gpu() and self.joules is None:
            found["note"] = "energy not measured: no NVML, or no meter"
        if self.waits:
            found["waits"] = dict(self.waits)
        return found

    def losses(self, every: int) -> list[list[float]]:
        """[step, loss] of one step in `every`, and of the last."""
        rows = [(row["step"], row["loss"]) for row in self.metrics if "loss" in row]
        return [[step, loss] for step, loss in rows if step % every == 0 or step == rows[-1][0]]


class Enough(Exception):
    """As many steps as were asked for have been seen."""


def graphs_compiled() -> int:
    return counters["stats"]["unique_graphs"]


@contextlib.contextmanager
def noting_waits(waits: Counter[str]) -> Iterator[None]:
    """Count where the host waits for the GPU inside.

    PyTorch can end the program at the first such place (set_sync_debug_mode("error")). Here it
    warns, so that one run on a rented GPU names them all.
    """
    if not on_gpu():
        yield
        return
    always = torch.is_warn_always_enabled()
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(always)
    for entry in log:
        if "called a synchronizing" in str(entry.message):
            path = Path(entry.filename)
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
            waits[f"{shown}:{entry.lineno}"] += 1


class Clock:
    """Times on the GPU's own clock: an event in the queue at each tick, read when all is over."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def tick(self) -> None:
        if on_gpu():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between neighbouring ticks."""
        pairs = itertools.pairwise(self.marks)
        if on_gpu():
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in pairs]
        return [1e3 * (end - start) for start, end in pairs]


Actions = dict[int, Callable[[], None]]  # what to do before step number n; 0 is the first


def watched_steps(
    steps: Iterable[loop.Step], seen: Seen, last: int, ends: bool, warmup: int, actions: Actions
) -> Iterator[loop.Step]:
    """The same steps; what is seen up to the start of step number `last` goes into `seen`.

    ends: that is the end, by Enough. Otherwise the steps go on.
    """
    clock = Clock()
    meter = energy_meter() if on_gpu() else None
    begun, graphs = 0.0, 0
    quiet = contextlib.ExitStack()
    try:
        for number, step in enumerate(steps):
            if number == 1:
                graphs = graphs_compiled()
            if number == FIRST_QUIET:
                quiet.enter_context(noting_waits(seen.waits))
            if number == warmup:
                quiet.close()
                begun = meter() if meter else 0.0
            if number in actions:
                actions[number]()
            if warmup <= number <= last:
                clock.tick()
            if number == last:
                seen.compiled_late = graphs_compiled() - graphs
                seen.joules = meter() - begun if meter else None
                seen.peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu() else 0.0
                if ends:
                    raise Enough
            if warmup <= number < last:
                seen.tokens.append(step[2]["tokens"])
                if "pairs" in step[2]:
                    seen.pairs.append(step[2]["pairs"])
            yield step
    finally:
        quiet.close()
        seen.milliseconds = clock.milliseconds()


def read_text(source: str) -> Iterator[str]:
    return (piece.text for piece in read_pieces(open_source(source), "train"))


read_later = monitor.read_later


def zeros_later(tensors: dict[str, Tensor], where: torch.device) -> Callable[[], dict[str, float]]:
    """On the stand-in for a GPU any value may be left over, and a loss of NaN would end the run."""
    read = read_later(tensors, where)
    return lambda: dict.fromkeys(read(), 0.0)


@contextlib.contextmanager
def on_this_machine(s: Size) -> Iterator[None]:
    """Inside, "gpt2" is the word tokenizer; on a CPU kernels are interpreted, none is generated."""
    words = word_tokenizer(read_text(s.text), s.model.vocab_size, "gpt2")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("fastlm.tokenizer._load_gpt2", return_value=words))
        if on_gpu() and rehearsing():
            stack.enter_context(mock.patch("fastlm.monitor.read_later", zeros_later))
            stack.enter_context(mock.patch("fastlm.checkpoint.check_finite"))
        if not on_gpu():
            stack.enter_context(triton_on_cpu())
            plain = partial(torch.compile, backend="eager")
            stack.enter_context(mock.patch("torch.compile", plain))
        yield


def watch(
    stage: Callable[[Any], int],
    cfg: Any,
    s: Size,
    limit: int | None = None,
    actions: Actions | None = None,
    prepare: Callable[[dict[str, Any]], None] = lambda given: None,
) -> Seen:
    """Run the stage and watch it.

    limit: end it after so many steps; without one it goes on to its own end, with the last
    validation and checkpoint. actions: what to do before a step, by its number. prepare: called
    with the arguments of the loop before it begins.
    """
    seen = Seen()
    run_steps = loop.train
    last = cfg.steps - 1 if limit is None else limit

    def train(*arguments: Any, **named: Any) -> int:
        given = inspect.signature(run_steps).bind(*arguments, **named)
        steps = watched_steps(
            given.arguments["batches"], seen, last, limit is not None, s.warmup, actions or {}
        )
        given.arguments["batches"] = steps
        seen.attention = given.arguments["run"].state["attention"]
        prepare(given.arguments)
        with contextlib.closing(steps):
            return run_steps(*given.args, **given.kwargs)

    torch._dynamo.reset()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    with on_this_machine(s), mock.patch.object(loop, "train", train), contextlib.suppress(Enough):
        code = stage(cfg)
        assert code == 0, f"the stage ended with exit code {code}"
    seen.seconds = time.perf_counter() - begun
    log = Path(cfg.out) / "metrics.jsonl"
    if log.is_file():
        seen.metrics = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return seen


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for a run whose results are read and thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def starting_model(s: Size, run: Path) -> Path:
    """A run of one step, for tuning to start from."""
    options = {"steps": 1, "batch_rows": 1, "compile": False, "validation_tokens": s.seq_len + 1}
    with on_this_machine(s):
        code = pretrain(pretrain_config(s, run, **options))
    assert code == 0, f"pretraining the starting model ended with exit code {code}"
    return run

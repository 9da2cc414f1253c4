"""What a run shows and records: progress, one JSON line per step, TensorBoard, GPU power, speed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor

from fastlm import files, runtime
from fastlm.errors import UserError
from fastlm.runtime import ceiling, peak_gib, ranks

BARS = " ▁▂▃▄▅▆▇█"
# of a validation; the file has all
SHOWN = ("loss", "perplexity", "rewards/accuracies", "rewards/margins", "kl")
PLAIN_SECONDS = 10.0  # between two lines where the output is not a terminal
NVML_SECONDS = 1.0  # between two questions to NVML, each of which takes milliseconds


class Power:
    """GPU power, utilisation and energy through NVML, at most once a second.

    What this GPU does not tell is left out.
    """

    def __init__(self, device: torch.device):
        self.handle: Any = None
        self.tokens = 0.0  # since the energy was last read
        if device.type != "cuda" or torch.version.hip:
            return
        try:
            import pynvml
        except ImportError:
            return
        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError:  # no driver, or a part of a GPU (MIG), which NVML names otherwise
            return
        self.joules = self.energy()
        self.clock = time.perf_counter()

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """The answer of an NVML function; None where a MIG or virtual GPU does not answer it."""
        try:
            return question(self.handle)
        except self.nvml.NVMLError:
            return None

    def energy(self) -> float | None:
        millijoules = self.ask(self.nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1000

    def read(self, tokens: float) -> dict[str, float]:
        """watts, utilisation (percent) and joules_per_token; nothing within a second of the last.

        tokens: how many the GPU has trained on since the last call.
        """
        self.tokens += tokens
        if self.handle is None or time.perf_counter() - self.clock < NVML_SECONDS:
            return {}
        figures = {}
        if (milliwatts := self.ask(self.nvml.nvmlDeviceGetPowerUsage)) is not None:
            figures["watts"] = milliwatts / 1000
        if (rates := self.ask(self.nvml.nvmlDeviceGetUtilizationRates)) is not None:
            figures["utilisation"] = rates.gpu
        joules = self.energy()
        if joules is not None and self.joules is not None:
            figures["joules_per_token"] = (joules - self.joules) / self.tokens
        self.joules = joules
        self.clock = time.perf_counter()
        self.tokens = 0.0
        return figures


def read_later(tensors: dict[str, Tensor], device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that gives the tensors' values.

    Called one step later, it never waits for the step that runs then.
    """
    stacked = torch.stack([tensor.detach().float() for tensor in tensors.values()])
    values = runtime.read_later(stacked, device)
    return lambda: dict(zip(tensors, values(), strict=True))


def wide_console(stderr: bool = False) -> Console:
    """A console for tables: as wide as the terminal, and 200 columns where the output is a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=200)


def sparkline(values: list[float], width: int = 60) -> str:
    """The course of a series in one line of text."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    chunks = [values[i : i + size] for i in range(0, len(values), size)]
    means = [sum(chunk) / len(chunk) for chunk in chunks]
    low = min(means)
    span = (max(means) - low) or 1
    return "".join(BARS[1 + round((mean - low) / span * 7)] for mean in means)


class Monitor:
    """A run's figures, on the screen and in its files.

    On a GPU one step's figures are read while the next one runs, so that logging never waits for
    the device.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        state: dict[str, Any],
        flops_per_token: float,
        device: torch.device,
        console: Console,
        tensorboard: bool = False,
    ):
        """run: its folder; steps: of the whole run; state: its "step" and "tokens" so far.

        flops_per_token: what one costs to train on. The main process alone records; power and
        memory are its device's.
        """
        rank, self.world = ranks()
        self.steps = steps
        self.start = state["step"]
        self.tokens = state["tokens"]
        self.flops = flops_per_token
        self.device = device
        self.console = console
        self.path = run / "metrics.jsonl" if rank == 0 else Path(os.devnull)
        peak, self.peak_name = ceiling(device)
        self.peak = peak * self.world
        self.power = Power(device)
        self.losses = keep_lines(self.path, self.start)
        # closed in close()
        self.file: TextIO = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.validations: list[dict[str, float]] = []
        self.pending: tuple[dict[str, Any], Callable[[], dict[str, float]]] | None = None
        self.power_shown: dict[str, float] = {}
        self.events = tensorboard_writer(run) if tensorboard and rank == 0 else None
        self.clock = self.begin = self.shown = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        warming_up = "compiling and warming up"
        self.task = self.progress.add_task(
            "step", total=steps, completed=self.start, text=warming_up
        )
        self.progress.start()

    def step(
        self,
        done: int,
        means: dict[str, Tensor],
        grad_norm: Tensor,
        lr: float,
        figures: dict[str, Any],
    ) -> None:
        """Note step number `done` (1 is the first); the figures of the one before are written now.

        means: "loss" and whatever else was averaged. figures: plain values, among them "tokens",
        all that the run has seen.
        """
        self.flush()
        values = read_later(means | {"grad_norm": grad_norm}, self.device)
        self.pending = {"step": done, "lr": lr, **figures}, values
        if self.device.type == "cpu":  # the step is over when its loss is there
            self.flush()

    def flush(self) -> None:
        """Read and write what is noted.

        Raises UserError where the loss is not finite, or the file cannot be written.
        """
        if self.pending is None:
            return
        row, values = self.pending
        row |= values()
        self.pending = None
        now = time.perf_counter()
        seconds = now - self.clock
        tokens = int(row["tokens"]) - self.tokens
        self.clock = now
        self.tokens = int(row["tokens"])
        rate = tokens / seconds
        row |= {
            "tokens_per_s": rate,
            "share_of_peak": rate * self.flops / self.peak,
            "peak_gib": peak_gib(self.device),
            "seconds": seconds,
        }
        if power := self.power.read(tokens / self.world):
            row |= power
            self.power_shown = power
        self.losses.append(row["loss"])
        self.write(row)
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"the loss became {row['loss']} at step {row['step']}: training has diverged; "
                f"lower --optim.lr, or lengthen --optim.warmup-steps"
            )
        self.show(row, now)

    def write(self, row: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as e:
            raise UserError(
                f"could not write {self.path}: {e.strerror}; free some space, then --resume"
            ) from None
        if self.events is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, float | int):
                    self.events.add_scalar(name, value, row["step"])

    def show(self, row: dict[str, Any], now: float) -> None:
        """Move the progress bar; where the output is no terminal, print a line now and then."""
        text = f"loss {row['loss']:.3f}  "
        if "rewards/accuracies" in row:
            text += f"accuracy {row['rewards/accuracies']:.0%}  "
        text += (
            f"lr {row['lr']:.2e}  {row['tokens_per_s']:,.0f} tok/s  "
            f"{row['share_of_peak']:.0%} {self.peak_name}  {row['peak_gib']:.1f} GiB"
        )
        if "watts" in self.power_shown:
            text += f"  {self.power_shown['watts']:.0f} W"
        if "joules_per_token" in self.power_shown:
            text += f"  {self.power_shown['joules_per_token'] * 1000:.2f} mJ/tok"
        step = row["step"]
        self.progress.update(self.task, completed=step, text=f"{step}/{self.steps}  {text}")
        timed = step - self.start - 1  # the first step compiles and warms up
        if not timed:
            self.begin = now
        if self.console.is_terminal:
            return
        if now - self.shown > PLAIN_SECONDS or not timed or step == self.steps:
            self.shown = now
            left = "first step"
            if timed:
                left = f"{(now - self.begin) / timed * (self.steps - step):.0f} s left"
            self.console.print(
                f"step {step}/{self.steps}  {text}  {left}", highlight=False, soft_wrap=True
            )

    def restart_clock(self) -> None:
        """Leave what happened since the last step (a validation, a checkpoint) out of the speed."""
        self.clock = time.perf_counter()

    def validation(self, done: int, means: dict[str, float]) -> None:
        """Record a validation, if there was anything to score; its time is not the next step's."""
        self.restart_clock()
        if not means:
            return
        self.validations.append(means)
        self.write({"step": done} | {f"validation_{name}": value for name, value in means.items()})
        text = ", ".join(f"{name} {means[name]:.4f}" for name in means if name in SHOWN)
        self.console.print(
            f"step {done}/{self.steps}  validation {text}", highlight=False, soft_wrap=True
        )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.progress.stop()
        self.file.close()
        if self.events is not None:
            self.events.close()


@contextmanager
def showing_bytes(console: Console) -> Iterator[Callable[[int, int | None, int], None]]:
    """A progress display for preparing text.

    Yields a callable that takes bytes done, bytes in all (or None) and tokens so far.
    """
    columns = (
        TextColumn("reading text"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, tokens: progress.update(task, completed=done, total=total)


def keep_lines(path: Path, last_step: int) -> list[float]:
    """Drop the JSON lines after last_step, which will come again; the training losses that stay.

    A line that a kill cut short, or that was damaged, goes too.
    """
    if not path.is_file():
        return []
    with files.disk_errors("read", path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = {line: parsed(line) for line in lines}
    kept = [line for line in lines if 0 <= rows[line].get("step", -1) <= last_step]
    files.write_text(path, "".join(line + "\n" for line in kept))
    return [rows[line]["loss"] for line in kept if "loss" in rows[line]]


def parsed(line: str) -> dict[str, Any]:
    """A line of metrics; empty where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(row, dict) and type(row.get("step")) is int
    return row if whole and isinstance(row.get("loss", 0.0), float) else {}


def tensorboard_writer(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs the package tensorboard; pip install 'fastlm[tensorboard]'"
        ) from None
    return SummaryWriter(str(run / "tensorboard"))

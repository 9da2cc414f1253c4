"""`fastlm plan`: the tables, the chart, or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastlm import files
from fastlm.charts import curves
from fastlm.config import PRESETS, PlanConfig, PretrainConfig
from fastlm.config.toml import load_recipe, override, shipped_recipes
from fastlm.errors import check, nearest
from fastlm.model import count_parameters, training_flops_per_token
from fastlm.plan import memory
from fastlm.plan.cards import Card, card
from fastlm.plan.duration import Run, run
from fastlm.plan.step import Step, step
from fastlm.plan.work import Way, Work, ways

PRESET_ROWS, PRESET_TOKENS = 32, 1024  # of a preset, which says nothing about batches
WIDTH = 96  # of the tables where the output is not a terminal
# Name, seconds, and from how many seconds on
UNITS = (("days", 86400, 172800), ("h", 3600, 7200), ("min", 60, 120), ("s", 1, 1))


def pretraining(name: str) -> PretrainConfig:
    """The recipe of that name, or a preset's model with 32 rows of at most 1,024 tokens."""
    shipped = [path.stem for path in shipped_recipes(PretrainConfig)]
    if name.endswith(".toml") or name in shipped:
        return load_recipe(PretrainConfig, name)
    known = f"{nearest(name, {*shipped, *PRESETS})} (or give the path of a .toml file)"
    check(name in PRESETS, f"unknown recipe or preset {name!r}; {known}")
    length = min(PRESET_TOKENS, PRESETS[name].max_seq_len)
    values = {"preset": name, "batch_rows": PRESET_ROWS, "seq_len": length}
    return override(PretrainConfig(), values)


def work_of_each(cfg: PlanConfig, recipe: PretrainConfig, gpus: int) -> Work:
    """One GPU's work; UserError where the rows cannot be shared out equally."""
    batch = cfg.batch_rows or recipe.batch_rows * gpus
    check(
        batch % gpus == 0,
        f"batch_rows is {batch}, not a multiple of {gpus} GPUs; change --batch-rows or --gpus",
    )
    share = batch // gpus
    rows = min(cfg.micro_batch_rows or recipe.micro_rows, share)
    check(
        share % rows == 0,
        f"micro_batch_rows is {rows}, which does not divide the {share} rows of a GPU",
    )
    recompute = cfg.checkpoint_activations or recipe.checkpoint_activations
    return Work(recipe.model, rows, recipe.seq_len, share // rows, recipe.optim.name, recompute)


class Case(NamedTuple):
    """A number of GPUs, one way to share the model out over them, and what follows."""

    work: Work
    way: Way
    fullest: str
    memory: memory.Moment
    fits: bool
    step: Step
    run: Run

    def values(self) -> dict[str, Any]:
        """Everything, as plain values."""
        plain = {"step": self.step._asdict(), "run": self.run._asdict()}
        return self._asdict() | plain | {"work": asdict(self.work), "way": asdict(self.way)}


def cases_of(cfg: PlanConfig, recipe: PretrainConfig, gpu: Card) -> list[Case]:
    found = []
    for gpus in dict.fromkeys(cfg.gpu_counts):
        work = work_of_each(cfg, recipe, gpus)
        for way in ways(gpus, cfg.gpus_per_node):
            fullest, moment = memory.peak(work, way, gpu)
            one = step(work, way, gpu)
            whole = run(work, way, gpu, one, cfg.tokens, cfg.write_gb_s)
            found.append(Case(work, way, fullest, moment, memory.fits(moment, gpu), one, whole))
    return found


def plan(cfg: PlanConfig) -> int:
    """Print the plan; write its chart where one is asked for."""
    gpu, recipe = card(cfg.gpu), pretraining(cfg.model)
    cases = cases_of(cfg, recipe, gpu)
    if cfg.chart:
        files.write_text(Path(cfg.chart), chart(cases))
    if cfg.json:
        values = [case.values() for case in cases]
        print(json.dumps({"projected": True, "gpu": gpu._asdict(), "cases": values}, indent=1))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for text in head(cfg, recipe, gpu):
        console.print(text, highlight=False, markup=False)
    for table in (memory_table(cases, gpu), step_table(cases), run_table(cases, cfg)):
        console.print()
        console.print(table)
    if cfg.chart:
        console.print(f"\nChart: {cfg.chart}", highlight=False, markup=False)
    return 0


def head(cfg: PlanConfig, recipe: PretrainConfig, gpu: Card) -> list[str]:
    """What is planned, in words."""
    model, length = recipe.model, recipe.seq_len
    flops = training_flops_per_token(model, length)
    return [
        f"Model: {cfg.model}, {count_parameters(model) / 1e6:,.1f}M parameters, "
        f"{flops / 1e9:.3f} GFLOP a token at {length:,} tokens a row",
        f"GPU:   {gpu.name}, {gpu.memory_gib} GiB at {gpu.memory_tb_s} TB/s, "
        f"{gpu.flops / 1e12:,.0f} TFLOP/s, {cfg.gpus_per_node} in a machine; "
        f"{gpu.node_gb_s:g} GB/s to those, {gpu.network_gb_s:g} to others",
        "Every figure is a projection, none was measured: docs/scaling.md",
    ]


def new_table(title: str, columns: str, left: tuple[int, ...] = (1,)) -> Table:
    """An empty table; left: numbers of the columns that are words."""
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    table.title_justify, table.title_style = "left", "bold"
    for number, name in enumerate(columns.split("|")):
        table.add_column(name, justify="left" if number in left else "right", no_wrap=True)
    return table


def memory_table(cases: list[Case], gpu: Card) -> Table:
    limits = f"{gpu.memory_gib} there, {memory.RESERVED_GIB} to be left free"
    title = f"Memory of a GPU, GiB, when it is fullest ({limits})"
    kinds = "weights|gradients|optimizer|activations|logits|work"
    table = new_table(title, f"GPUs|mode|{kinds}|in all|fullest", left=(1, 9))
    for case in cases:
        sizes = [case.memory[kind] for kind in memory.KINDS]
        cells = [f"{size / 2**30:.2f}" for size in (*sizes, sum(sizes))]
        table.add_row(*place(case), *cells, case.fullest if case.fits else "too full")
    return table


def step_table(cases: list[Case]) -> Table:
    title = "An optimizer step; waiting is the sending that no computing hides"
    table = new_table(
        title, "GPUs|mode|rows|tokens|compute|sent|sending|waiting|in all|tokens/s|MFU"
    )
    for case in cases:
        seconds, waiting = case.run.step_s, case.step.waiting_s
        table.add_row(
            *place(case),
            f"{case.work.passes} x {case.work.rows}",
            short(case.step.tokens),
            time(seconds - waiting),
            f"{short(case.step.sent_bytes)}B",
            time(case.step.sending_s),
            time(waiting),
            time(seconds),
            short(case.run.tokens_per_s),
            f"{case.run.mfu:.1%}",
        )
    return table


def run_table(cases: list[Case], cfg: PlanConfig) -> Table:
    size = cases[0].run.checkpoint_bytes / 1e9
    title = f"{short(cfg.tokens)} tokens; a checkpoint of {size:,.2f} GB"
    table = new_table(title, "GPUs|mode|tokens/day|duration|failures|written in|every|lost|MWh")
    for case in cases:
        run = case.run
        table.add_row(
            *place(case),
            short(run.tokens_per_day),
            time(run.seconds),
            f"{run.failures:,.2f}",
            time(run.checkpoint_s),
            time(run.every_s),
            f"{run.lost:.2%}",
            f"{run.mwh:,.2f}",
        )
    return table


def place(case: Case) -> tuple[str, str]:
    return f"{case.way.gpus:,}", case.way.mode


def short(number: float) -> str:
    """Three figures and a letter: 1.00T, 33.6M."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{three(number / power)}{letter}"
    return three(number)


def time(seconds: float) -> str:
    """Three figures in the unit that suits."""
    for unit, length, least in UNITS:
        if seconds >= least:
            return f"{three(seconds / length)} {unit}"
    return f"{three(1000 * seconds)} ms"


def three(number: float) -> str:
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:,.{digits}f}"


def chart(cases: list[Case]) -> str:
    """Tokens a day by GPUs, a curve for each mode that fits; a single GPU is the start of all."""
    fitting = [case for case in cases if case.fits]
    mend = "there is nothing to draw; leave --chart out"
    check(bool(fitting), f"the model fits no GPU in any mode: {mend}")
    modes = sorted({case.way.mode for case in fitting} - {"one"}) or ["one"]
    unit = "billion tokens a day, projected"
    rows = []
    for mode in modes:
        for case in fitting:
            if case.way.mode in (mode, "one"):
                rate = case.run.tokens_per_day / 1e9
                rows.append({"unit": unit, "peer": mode, "at": case.way.gpus, "median": rate})
    return curves("GPUs", rows)

"""`fastlm report`: read the runs, score their models, write the page."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from fastlm.config import ReportConfig
from fastlm.errors import UserError, check
from fastlm.files import write_text
from fastlm.report.page import Report, markdown, page
from fastlm.report.runs import RunRecord, read_runs
from fastlm.report.scores import EMBEDDED, Scores, held_out_text, score
from fastlm.runtime import pick_device


def report(cfg: ReportConfig) -> int:
    """Write report.html and report.md; returns the exit code."""
    device = pick_device(cfg.device)
    out = Path(cfg.out or (f"{cfg.runs[0]}/report.html" if len(cfg.runs) == 1 else "report.html"))
    check(out.suffix == ".html", f"--out is {out}, expected a name that ends with .html")
    console = Console(stderr=True)
    write_report(cfg.runs, out, cfg.data, cfg.scores, device, console)
    print(f"{out}, and {out.with_suffix('.md').name} beside it")
    return 0


def write_report(
    places: tuple[str, ...],
    out: Path,
    data: str,
    scored: bool,
    device: torch.device,
    console: Console,
) -> None:
    """Write the page on the runs to `out`, and the same in Markdown beside it.

    data: the text to score the models on ("": that of the first run). scored: whether the models
    are loaded at all. Raises UserError where a place is no run.
    """
    records, table, settings = read_runs(places)
    scores: dict[str, Scores] = {}
    name = data or text_of(records, settings)
    unscored = "--no-scores was given"
    if scored:
        try:
            scores = scores_of(records, name, device, console)
        except UserError as error:
            check(not data, str(error))  # what was asked for must be there
            unscored = str(error)
    machine = f"{device}, PyTorch {torch.__version__}"
    found = Report(records, table, settings, scores, name, unscored, machine)
    write_text(out, page(found))
    write_text(out.with_suffix(".md"), markdown(found))


def text_of(records: list[RunRecord], settings: dict) -> str:
    """The text that a pipeline was scored on, or a run was trained on, or else the embedded one."""
    trained = [record.settings["data"] for record in records if record.stage == "pretrain"]
    return settings.get("eval", {}).get("data") or (trained or [EMBEDDED])[0]


def scores_of(
    records: list[RunRecord], name: str, device: torch.device, console: Console
) -> dict[str, Scores]:
    """Every run's model on the same text."""
    with console.status("reading text") as status:
        text = held_out_text(name)
        taught = [record.settings for record in records if record.stage == "sft"]
        return {
            record.name: score(
                record.folder, text, taught[0] if taught else {}, device, status.update
            )
            for record in records
        }

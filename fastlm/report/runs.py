"""What a run's folder says about it: its steps, validations, configuration and last state."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.checkpoint import locate, read_state
from fastlm.config import ModelConfig
from fastlm.config.toml import override
from fastlm.errors import UserError, check
from fastlm.model import count_parameters
from fastlm.monitor import parsed

STAGES = ("pretrain", "sft", "dpo")  # the folders of a pipeline
# what each row of a pipeline's table has
COLUMNS = {
    "model",
    "parameters",
    "text",
    "text_sha256",
    "perplexity",
    "answer_perplexity",
    "prefers_chosen",
}


@dataclass(frozen=True)
class RunRecord:
    """One run, as its folder tells it.

    steps: a line of metrics.jsonl for each training step; validations: one for each validation.
    state: plain values of the last checkpoint, empty before there is one. settings: config.toml as
    nested tables; text: the same as it stands there.
    """

    name: str
    folder: Path
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    state: dict[str, Any]
    settings: dict[str, Any]
    text: str

    @property
    def parameters(self) -> int | None:
        """Trainable parameters; None before the first checkpoint."""
        if "model" not in self.state:
            return None
        return count_parameters(override(ModelConfig(), self.state["model"], str(self.folder)))

    @property
    def stage(self) -> str:
        """One of STAGES, told by the options that only it has."""
        if "beta" in self.settings:
            return "dpo"
        return "sft" if "max_len" in self.settings else "pretrain"

    @property
    def has_shortlist(self) -> bool:
        """Whether the training loss is over a part of the vocabulary."""
        return bool(self.settings.get("shortlist"))


def read_runs(
    places: tuple[str, ...],
) -> tuple[list[RunRecord], list[dict[str, Any]], dict[str, Any]]:
    """The runs in folders of runs and pipelines, in order.

    Also the rows of the last pipeline's table, and its settings; both empty without one. Raises
    UserError where a folder holds neither.
    """
    folders: list[Path] = []
    table: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for place in places:
        folder = Path(place)
        stages = [folder / name for name in STAGES if (folder / name / "metrics.jsonl").is_file()]
        if stages:
            settings = read_settings(folder)[0]
            table = read_table(folder)
        elif (folder / "metrics.jsonl").is_file():
            stages = [folder]
        else:
            what = "holds no metrics.jsonl" if folder.is_dir() else "does not exist"
            raise UserError(f"{folder} {what}; give the folder of a run or of a pipeline")
        folders += stages
    check(len(set(folders)) == len(folders), "a run is named twice; name each once")
    names = shortest_names(folders)
    return [read_run(f, name) for f, name in zip(folders, names, strict=True)], table, settings


def shortest_names(folders: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_run(folder: Path, name: str) -> RunRecord:
    """A run that may still be under way; damaged lines of its metrics are passed over."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [row for row in map(parsed, lines) if row]
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_loss" in row]
    try:
        state = read_state(locate(folder))
    except UserError:  # no checkpoint yet: what the metrics say can be shown all the same
        state = {}
    settings, text = read_settings(folder)
    return RunRecord(name, folder, steps, validations, state, settings, text)


def read_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """A folder's config.toml as tables, and as text; UserError where it cannot be read."""
    path = folder / "config.toml"
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except (OSError, ValueError) as error:
        raise UserError(
            f"could not read {path}: {error}; is {folder} the folder of a run?"
        ) from None


def read_table(folder: Path) -> list[dict[str, Any]]:
    """The rows that a pipeline has written at its end; none before that."""
    path = folder / "results.json"
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = None
    rows = rows if isinstance(rows, list) else [{}]
    whole = all(isinstance(row, dict) and row.keys() >= COLUMNS for row in rows)
    hint = "remove it, and run the pipeline's command again"
    check(whole, f"{path} is not a pipeline's table; {hint}")
    return rows

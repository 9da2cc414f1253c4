"""Checkpoints: a folder per step with safetensors weights, optimizer tensors and a JSON of plain values. Nothing is unpickled.

    RUN/checkpoints/step-000150/model.safetensors      parameters
                                optimizer.safetensors  optimizer state and random-number state
                                state.json             step, data position, validation loss, shapes, SHA-256 of the files

A checkpoint is there whole or not at all (fastlm.files).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastlm import files
from fastlm.config import ModelConfig
from fastlm.config.toml import override
from fastlm.errors import UserError
from fastlm.model import Transformer

FILES = ("model.safetensors", "optimizer.safetensors")


def random_state() -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def save(folder: Path, model: nn.Module, optimizer: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write folder/step-NNNNNN and return it.

    optimizer: every tensor of the optimizers' states, by name.
    state: plain values; holds at least step, validation_loss (None where it was not measured) and model, the shape.
    """
    final = folder / f"step-{state['step']:06d}"
    try:
        with files.whole_folder(final) as beside:
            parameters = {name: p.detach().contiguous() for name, p in model.named_parameters()}
            files.write_tensors(beside / FILES[0], parameters)
            files.write_tensors(beside / FILES[1], optimizer | random_state())
            digests = {name: files.sha256(beside / name) for name in FILES}
            files.write_json(beside / "state.json", state | {"sha256": digests})
    except files.DiskError as error:
        earlier = steps_saved(folder)
        if not earlier:
            raise
        raise UserError(f"{error}; then --resume: {earlier[-1].name} is whole") from None
    return final


def steps_saved(folder: Path) -> list[Path]:
    """Checkpoints in the folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def best(folder: Path) -> tuple[Path | None, float]:
    """The checkpoint in the folder with the lowest validation loss, and that loss (inf if none has one)."""
    noted = [
        (json.loads((p / "state.json").read_text(encoding="utf-8")).get("validation_loss"), p) for p in steps_saved(folder)
    ]
    scored = [(nats, p) for nats, p in noted if nats is not None]
    return min(scored, default=(float("inf"), None))[::-1]


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep` and the best."""
    kept = {best(folder)[0], *steps_saved(folder)[-keep:]}
    for path in steps_saved(folder):
        if path not in kept:
            files.remove_folder(path)


def locate(place: str | Path, lowest_loss: bool = False) -> Path:
    """The checkpoint that a path names: a checkpoint folder, or a run folder (its last checkpoint, or its best)."""
    path = Path(place)
    if (path / "state.json").is_file():
        return path
    saved = steps_saved(path / "checkpoints")
    if not saved:
        what = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; give a run folder or one of its checkpoints/step-* folders")
    return (best(path / "checkpoints")[0] if lowest_loss else None) or saved[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's plain values, its files' digests verified."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            if files.sha256(checkpoint / name) != expected:
                raise UserError(f"{checkpoint / name} is corrupted: its SHA-256 is not the one noted when it was written; resume from another checkpoint")  # fmt: skip  # noqa: E501
        return state
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{checkpoint} is not a whole checkpoint: {e}; choose another step-* folder") from None


def tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"could not read {path}: {e}; choose another checkpoint") from None


@torch.no_grad()
def fill(wanted: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    """Copy the tensors found into those wanted; other names or shapes raise UserError, before anything is copied."""
    for name in sorted(found.keys() | wanted.keys()):
        a, b = (str(tuple(t[name].shape)) if name in t else "missing" for t in (found, wanted))
        if a != b:
            raise UserError(f"{what}: {name} is {a} there and {b} here; use the run's own configuration")
    for name, tensor in wanted.items():
        tensor.copy_(found[name])


def load_parameters(checkpoint: Path, model: nn.Module) -> None:
    """Copy the checkpoint's parameters into the model; other names or shapes raise UserError."""
    fill(dict(model.named_parameters()), tensors(checkpoint / FILES[0]), f"{checkpoint} holds a model of another shape")


def load(checkpoint: Path, model: nn.Module, optimizer: dict[str, Tensor]) -> dict[str, Any]:
    """Put everything back where save() found it; returns the plain values."""
    state = read_state(checkpoint)
    load_parameters(checkpoint, model)
    found = tensors(checkpoint / FILES[1])
    torch.set_rng_state(found.pop("random.cpu"))
    cuda = found.pop("random.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    fill(optimizer, found, f"{checkpoint} holds another optimizer's state")
    return state


def load_model(place: str | Path, device: torch.device) -> tuple[Transformer, dict[str, Any]]:
    """The model of a checkpoint folder, or of a run's best checkpoint, for inference; and the checkpoint's plain values."""
    checkpoint = locate(place, lowest_loss=True)
    state = read_state(checkpoint)
    model = Transformer(override(ModelConfig(), state["model"], str(checkpoint / "state.json")))
    load_parameters(checkpoint, model)
    return model.to(device).eval(), state

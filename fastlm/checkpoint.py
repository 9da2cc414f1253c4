"""Checkpoints: a folder per step with weights, optimizer tensors and a JSON of plain values.

Tensors are in safetensors files; nothing is unpickled.

    RUN/checkpoints/step-000150/
      model.safetensors      parameters
      optimizer.safetensors  optimizer state and random-number state
      state.json             step, data position, validation loss, shapes, and the SHA-256 of the
                             files and of all that state.json itself says

A checkpoint is there whole or not at all (fastlm.files). Without its state.json a folder is no
checkpoint. Several processes write a checkpoint in parts instead (fastlm.parts), which is read in
the same places; tensors are named model.NAME and optimizer.NAME there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastlm import files, parts
from fastlm.config import ModelConfig
from fastlm.config.toml import override
from fastlm.errors import UserError, check
from fastlm.model import Transformer
from fastlm.model.old_names import current_name, old_names
from fastlm.schema import read_object

FILES = ("model.safetensors", "optimizer.safetensors")
STATE = "state.json"  # what makes a folder a checkpoint
MEND = "choose another step-* folder, or delete this one and --resume the run"


def random_state() -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state


def save(
    folder: Path, model: nn.Module, optimizer: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write folder/step-NNNNNN and return it.

    optimizer: every tensor of the optimizers' states, by name. state: plain values; holds at least
    step, validation_loss (None where it was not measured) and model, the shape. Raises UserError
    where a parameter is not finite, and where the disk refuses; earlier checkpoints stay as they
    are.
    """
    final = place_of(folder, state["step"])
    parameters = finite_parameters(folder, model, state["step"])
    with naming_the_last(folder), files.whole_folder(final) as beside:
        files.write_tensors(beside / FILES[0], parameters)
        files.write_tensors(beside / FILES[1], optimizer | random_state())
        write_state(beside, state, {name: files.sha256(beside / name) for name in FILES})
    return final


def place_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def write_state(beside: Path, state: dict[str, Any], digests: dict[str, str]) -> None:
    whole = state | {"sha256": digests}
    files.write_json(beside / STATE, whole | {"state_sha256": digest_of(whole)})


def go_on(folder: Path) -> str:
    """How to go on behind an error, where there is a checkpoint to go on from."""
    earlier = steps_saved(folder)
    return f"; then --resume: {earlier[-1].name} is whole" if earlier else ""


@contextlib.contextmanager
def naming_the_last(folder: Path) -> Iterator[None]:
    """What the disk refuses in the block, in one line that names the last checkpoint."""
    try:
        yield
    except files.DiskError as error:
        raise UserError(f"{error}{go_on(folder)}") from None


def finite_parameters(folder: Path, model: nn.Module, step: int) -> dict[str, Tensor]:
    """The model's parameters, which may be saved: UserError where one is not finite."""
    check_finite(
        model,
        f"after step {step}",
        f"lower --optim.lr, or lengthen --optim.warmup-steps{go_on(folder)}",
    )
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def begin_part(
    beside: Path, parameters: dict[str, Tensor], optimizer: dict[str, Tensor], group: Any
) -> Future:
    """Write this process's part of a checkpoint into a folder while training goes on.

    Group as in fastlm.parts.
    """
    tensors = {f"model.{name}": tensor for name, tensor in parameters.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
    return parts.begin_to_write(beside, tensors | random_state(), group)


def digest_part(written: Future, beside: Path, number: int) -> dict[str, str]:
    """The digest of this process's part when it is written, by its name; it may have none.

    Raises DiskError.
    """
    from torch.distributed.checkpoint import CheckpointException

    try:
        written.result()
    except CheckpointException as failed:
        causes = [cause for cause, _ in failed.failures.values() if isinstance(cause, OSError)]
        if not causes:
            raise
        raise files.DiskError(causes[0], "write", beside, "") from None
    file = beside / parts.name_of(number)
    return {file.name: files.sha256(file)} if file.is_file() else {}


def publish(beside: Path, final: Path, state: dict[str, Any], digests: dict[str, str]) -> None:
    """Give a folder of parts its state.json and its place: from now on it is a checkpoint.

    digests: of all parts.
    """
    with files.disk_errors("write", final):
        write_state(beside, state, digests)
        files.move_into_place(beside, final)


def check_finite(model: nn.Module, when: str, mend: str) -> None:
    """Raise UserError where a parameter holds NaN or infinity.

    Such weights are never saved and never trained on.
    """
    named = list(model.named_parameters())
    broken = torch.stack(
        [parts.local(p.detach()).isfinite().logical_not().any() for _, p in named]
    ).tolist()
    bad = [name for (name, _), is_broken in zip(named, broken, strict=True) if is_broken]
    check(
        not bad,
        f"{when} the weights are not finite ({bad[0] if bad else ''}): training has diverged; "
        f"{mend}",
    )


def digest_of(state: dict[str, Any]) -> str:
    """SHA-256 of plain values, whatever their order."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def steps_saved(folder: Path) -> list[Path]:
    """Checkpoints in the folder, oldest first; a folder without its state.json is none."""
    steps = {
        p: p.name.removeprefix("step-") for p in folder.glob("step-*") if (p / STATE).is_file()
    }
    return sorted(
        (p for p, number in steps.items() if number.isdecimal()), key=lambda p: int(steps[p])
    )


def best(folder: Path) -> tuple[Path | None, float]:
    """The checkpoint in the folder with the lowest validation loss, and that loss (inf if none has
    one).

    What cannot be read, and a loss that is not finite, does not count.
    """
    found: tuple[Path | None, float] = (None, math.inf)
    for path in steps_saved(folder):
        with contextlib.suppress(UserError):
            nats = read_object(path / STATE, MEND).get("validation_loss")
            if isinstance(nats, float) and math.isfinite(nats) and nats < found[1]:
                found = (path, nats)
    return found


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep` and the best."""
    kept = {best(folder)[0], *steps_saved(folder)[-keep:]}
    for path in steps_saved(folder):
        if path not in kept:
            files.remove_folder(path)


def locate(place: str | Path, lowest_loss: bool = False) -> Path:
    """The checkpoint that a path names.

    A checkpoint folder, or a run folder (its last checkpoint, or its best).
    """
    path = Path(place)
    if (path / STATE).is_file():
        return path
    saved = steps_saved(path / "checkpoints")
    if not saved:
        what = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise UserError(
            f"{path} {what}; give a run folder or one of its checkpoints/step-* folders"
        )
    return (best(path / "checkpoints")[0] if lowest_loss else None) or saved[-1]


def newest_whole(run: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The last checkpoint of a run that is whole, its plain values, and what is wrong with each one
    after it.

    Raises UserError where the run has no whole checkpoint.
    """
    problems: list[str] = []
    for path in reversed(steps_saved(run / "checkpoints") or [locate(run)]):
        try:
            return path, read_state(path), problems
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"{run} has no whole checkpoint; start a new run. The last one: {problems[0]}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's plain values, their digest and its files' verified."""
    path = checkpoint / STATE
    state = read_object(path, MEND)
    noted = state.pop("state_sha256", None)
    check(noted in (None, digest_of(state)), f"{path} was changed after it was written; {MEND}")
    digests, step = state.get("sha256"), state.get("step")
    known = (
        isinstance(digests, dict)
        and (sorted(digests) == sorted(FILES) or parts.are_parts(digests))
        and type(step) is int
    )
    check(
        known,
        f"{path} is not the state of a checkpoint: it lacks its step, or the digests of its files; "
        f"{MEND}",
    )
    for name in state["sha256"]:
        with files.disk_errors("read", checkpoint / name, MEND):
            same = files.sha256(checkpoint / name) == state["sha256"][name]
        check(
            same,
            f"{checkpoint / name} is damaged: "
            f"its SHA-256 is not the one noted when it was written; {MEND}",
        )
    return state


def tensors(path: Path) -> dict[str, Tensor]:
    with reading(path):
        return load_file(path)


@torch.no_grad()
def fill(wanted: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    """Copy the tensors found into those wanted.

    Other names or shapes raise UserError, before anything is copied.
    """
    check_shapes(wanted, {name: tensor.shape for name, tensor in found.items()}, what)
    for name, tensor in wanted.items():
        parts.copy_whole(tensor, found[name])


def check_shapes(wanted: dict[str, Tensor], found: Mapping[str, torch.Size], what: str) -> None:
    """Raise UserError where names or shapes differ."""
    for name in sorted(found.keys() | wanted.keys()):
        a = str(tuple(found[name])) if name in found else "missing"
        b = str(tuple(wanted[name].shape)) if name in wanted else "missing"
        check(a == b, f"{what}: {name} is {a} there and {b} here; use the run's own configuration")


@torch.no_grad()
def fill_from_parts(checkpoint: Path, kind: str, wanted: dict[str, Tensor], what: str) -> None:
    """fill() with the tensors of one kind, model or optimizer, from a checkpoint in parts."""
    with reading(checkpoint):
        found = parts.read_metadata(checkpoint)
        of_kind = {
            name.removeprefix(f"{kind}."): shape
            for name, shape in found.items()
            if name.startswith(f"{kind}.")
        }
        check_shapes(wanted, of_kind, what)
        parts.read(
            checkpoint, {f"{kind}.{name}": tensor.detach() for name, tensor in wanted.items()}
        )


def random_from_parts(checkpoint: Path) -> dict[str, Tensor]:
    """The random state in a checkpoint in parts: that of one of its processes."""
    with reading(checkpoint):
        found = parts.read_metadata(checkpoint)
        random = {
            name: torch.empty(shape, dtype=torch.uint8)
            for name, shape in found.items()
            if name.startswith("random.")
        }
        parts.read(checkpoint, random)
    return random


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise UserError(f"could not read {path}: {e}; {MEND}") from None


def is_in_parts(checkpoint: Path) -> bool:
    return not (checkpoint / FILES[0]).exists()


def load_parameters(checkpoint: Path, model: nn.Module) -> None:
    """Copy the checkpoint's parameters into the model; other names or shapes raise UserError."""
    wanted: dict[str, Tensor] = dict(model.named_parameters())
    what = f"{checkpoint} holds a model of another shape"
    if is_in_parts(checkpoint):
        fill_from_parts(checkpoint, "model", wanted, what)
    else:
        found = {
            current_name(name): tensor for name, tensor in tensors(checkpoint / FILES[0]).items()
        }
        fill(wanted, found, what)


def load(checkpoint: Path, model: nn.Module, optimizer: dict[str, Tensor]) -> dict[str, Any]:
    """Put everything back where save() found it; returns the plain values."""
    state = read_state(checkpoint)
    restore(checkpoint, model, optimizer)
    return state


def restore(checkpoint: Path, model: nn.Module, optimizer: dict[str, Tensor]) -> None:
    """Put the tensors and the random state of a checkpoint back.

    Its digests are the caller's to verify.
    """
    load_parameters(checkpoint, model)
    check_finite(model, f"in {checkpoint}", MEND)
    what = f"{checkpoint} holds another optimizer's state"
    found = (
        random_from_parts(checkpoint) if is_in_parts(checkpoint) else tensors(checkpoint / FILES[1])
    )
    random = found.pop("random.cpu", None)
    if random is None:
        raise UserError(f"{checkpoint} holds no random state; {MEND}")
    cuda = found.pop("random.cuda", None)
    if is_in_parts(checkpoint):
        fill_from_parts(checkpoint, "optimizer", optimizer, what)
    else:
        fill(optimizer, named_by_parameter(found, dict(model.named_parameters())), what)
    torch.set_rng_state(random)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def named_by_parameter(
    found: dict[str, Tensor], parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """An optimizer's tensors by parameter and kind, whenever they were written.

    The first checkpoints have two numbers instead, the optimizer's and the parameter's in it:
    0.12.momentum. Over all optimizers these count the blocks' matrices, the embedding, the head,
    then all vectors.
    """
    found = {current_name(name): tensor for name, tensor in found.items()}
    if not any(name[0].isdecimal() for name in found):
        return found

    def group(name: str) -> int:
        return 3 if parameters[name].dim() == 1 else {"embedding": 1, "head": 2}.get(name, 0)

    counted = [name.split(".") for name in found]  # optimizer, parameter, kind
    numbers = sorted({(int(i), int(j)) for i, j, _ in counted})
    order = sorted(old_names(parameters).values(), key=group)
    names = dict(zip(numbers, order, strict=False))
    return {
        f"{names.get((int(i), int(j)), i)}.{kind}": found[f"{i}.{j}.{kind}"]
        for i, j, kind in counted
    }


def load_model(place: str | Path, device: torch.device) -> tuple[Transformer, dict[str, Any]]:
    """The model of a checkpoint folder, or of a run's best checkpoint, for inference.

    And the checkpoint's plain values.
    """
    checkpoint = locate(place, lowest_loss=True)
    state = read_state(checkpoint)
    model = Transformer(override(ModelConfig(), state["model"], str(checkpoint / "state.json")))
    load_parameters(checkpoint, model)
    return model.to(device).eval(), state

"""The reference pass: what the model that a run starts from thinks of the answers.

Preference losses compare the model in training with the one it started from. Of that one only the
log-probabilities of the answers are needed. They are computed in one pass before training, kept in
a file, and read back row by row, so that training holds one model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastlm import files
from fastlm.data import IGNORED
from fastlm.data.examples.packing import PackedBatch, PackedRows
from fastlm.data.prefetch import move
from fastlm.train import parallel


@dataclass(frozen=True)
class ReferencePass:
    """Who computes the log-probabilities, and where they are kept.

    logprobs: a batch's log p of its targets (rows, row_len) by the reference model. model_hash:
    what tells that model from others.
    """

    logprobs: Callable[[PackedBatch], Tensor]
    model_hash: str
    cache: Path
    device: torch.device
    console: Console


def reference_logprobs(
    reference: ReferencePass,
    rows: PackedRows,
    batches: Iterable[tuple[PackedBatch, bool]],
    n_batches: int,
    name: str,
) -> np.ndarray:
    """log p of each target by the reference model, (n_rows, row_len) fp32, NaN in rows not used.

    batches: this process's share of the n_batches batches that the run uses, as many in each
    process; those with False are another's. They are scored as they come in training and by the
    same program, which is why gradients stay on: so the first step's rewards are 0. What the file
    for this model and these rows holds already is not computed again, nor is what another process
    computes. name: of these rows, for the user.
    """
    file = reference.cache / f"reference-{key_of(reference, rows)}.f32"
    known = read_kept(file, (len(rows), rows.row_len))
    computed = 0
    console = reference.console
    for batch, mine in track(
        batches,
        f"reference, {name} pairs",
        n_batches // parallel.ranks()[1],
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        real = batch.numbers >= 0
        at = batch.numbers[real].numpy()
        wanted = mine and bool(np.isnan(known[at]).any())
        # A sharded model makes its passes in all processes or in none.
        if parallel.all_reduce_max(wanted)[0]:
            with parallel.micro_batch(last=False):
                logps = reference.logprobs(move(batch, reference.device))
            if wanted:
                known[at] = logps.detach().cpu()[real].numpy()
                computed += 1
    computed = sum(parallel.all_gather(computed))
    if computed:
        known = parallel.merge_found(known)
        if parallel.is_main_process():
            write_kept(file, known)
    console.print(
        f"Reference: log-probabilities of the {name} pairs, {computed:,} of {n_batches:,} batches "
        "computed, the rest kept",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return known


def write_kept(file: Path, logprobs: np.ndarray) -> None:
    """The log-probabilities, fp32, behind their SHA-256."""
    content = logprobs.astype("<f4").tobytes()
    files.write_bytes(file, hashlib.sha256(content).digest() + content)


def read_kept(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """What write_kept() wrote; NaN everywhere where there is no such file, or a damaged one."""
    content = file.read_bytes() if file.is_file() else b""
    digest, numbers = content[:32], content[32:]
    if len(numbers) != 4 * shape[0] * shape[1] or hashlib.sha256(numbers).digest() != digest:
        return np.full(shape, np.nan, np.float32)
    return np.frombuffer(numbers, "<f4").reshape(shape).copy()


def key_of(reference: ReferencePass, rows: PackedRows) -> str:
    """What tells these log-probabilities from others: model, rows, and the kind of device."""
    what = f"{reference.model_hash} {rows.row_len} {rows.rows} {reference.device.type}"
    key = hashlib.sha256(what.encode())
    for array in (rows.ids, rows.counted, rows.shared):
        key.update(np.ascontiguousarray(array).data)
    return key.hexdigest()[:16]


def with_reference(batch: PackedBatch, logprobs: np.ndarray | None) -> tuple[PackedBatch, Tensor]:
    """The batch and the reference's log p of its targets, (rows, row_len) fp32; zeros for None."""
    if logprobs is None:
        return batch, torch.zeros(batch.y.shape)
    # an empty row's number is -1; none of its slots is counted
    rows = torch.from_numpy(logprobs[batch.numbers.numpy()])
    return batch, torch.where(batch.y == IGNORED, 0, rows)

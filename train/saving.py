"""When and how a run saves itself: one process at once, several in parts while training goes on.

In several processes a checkpoint is copied to the host, written by all of them beside its place,
and moved there when the last one has finished: by the process that writes for its folder, between
two steps, so that no process waits for a disk.
"""

from __future__ import annotations

import copy
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlm import checkpoint, files
from fastlm.train import parallel
from fastlm.train.optim import named_state


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written.

    Where, its place to be, its plain values, and the digests of this process's part.
    """

    beside: Path
    place: Path
    state: dict[str, Any]
    digests: Future


class Saver:
    """The checkpoints of a run: `run` as in train/loop.py."""

    def __init__(self, run: Any):
        self.run = run
        self.folder: Path = run.folder / "checkpoints"
        self.best = checkpoint.best(self.folder)[1]
        self.pending: Pending | None = None
        in_parts = parallel.ranks()[1] > 1 or parallel.shards(run.model)
        self.group = parallel.saving_group() if in_parts else None
        self.thread = ThreadPoolExecutor(1)

    def improved(self) -> bool:
        """Whether this step's validation, if there was one, beats those of all checkpoints."""
        nats = self.run.state["validation_loss"]
        return nats is not None and nats < self.best

    def save(self) -> None:
        """Save the run as it is now; earlier checkpoints are removed when this one is there."""
        run = self.run
        nats = run.state["validation_loss"]
        if nats is not None and math.isfinite(nats):
            self.best = min(self.best, nats)
        tensors = named_state(run.model, run.optimizers)
        if self.group is None:
            checkpoint.save(self.folder, run.model, tensors, run.state)
            checkpoint.prune(self.folder, run.cfg.keep_checkpoints)
            return
        self.wait()
        self.pending = self.begin(tensors)

    def begin(self, optimizer: dict[str, Tensor]) -> Pending:
        state = copy.deepcopy(self.run.state)
        parameters = checkpoint.finite_parameters(self.folder, self.run.model, state["step"])
        place = checkpoint.place_of(self.folder, state["step"])
        beside = parallel.from_writer(lambda: files.folder_beside(place))
        written = checkpoint.begin_part(beside, parameters, optimizer, self.group)
        digests = self.thread.submit(
            checkpoint.digest_part, written, beside, parallel.number_among_writers()
        )
        return Pending(beside, place, state, digests)

    def is_writing(self) -> bool:
        return self.pending is not None and not self.pending.digests.done()

    def publish(self) -> None:
        """Move a checkpoint into its place, if one is pending.

        Called by all processes when none is writing any more.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        with checkpoint.naming_the_last(self.folder):
            found = parallel.all_gather_in_folder(pending.digests.result())
            if parallel.writes():
                digests = {name: digest for part in found for name, digest in part.items()}
                checkpoint.publish(pending.beside, pending.place, pending.state, digests)
                checkpoint.prune(self.folder, self.run.cfg.keep_checkpoints)

    def wait(self) -> None:
        """Until what was begun is in its place, in all processes."""
        if self.pending is not None:
            self.pending.digests.exception()
        parallel.all_reduce_max(0)
        self.publish()
        parallel.all_reduce_max(0)

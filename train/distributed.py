"""Training in several processes that torchrun started: each takes its share of every step's rows, all take the same step.

With R processes of which this is number r (0 is the first), a step of B rows in micro-batches of b is that of one process,

    loss = sum over all rows of the loss / n_counted,   n_counted = sum over r of what is counted in process r's rows

and process r makes the micro-batches r, r + R, r + 2 R, ... of it. After its last backward pass gradients are added over the
processes once, in buckets of fixed order; every process then clips and steps by itself. Each holds the whole model and the
whole optimizer state (AdamW 8, Muon 4 bytes a parameter): nothing is sharded, so a model must fit one device. The position in
the data counts rows over all processes, so a run may go on with another number of them. The first alone prints and writes.

Plain numbers go through gloo, whatever the device: the GPUs are never waited for. One process runs none of this.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from fastlm.config import StageConfig
from fastlm.errors import check, divisors
from fastlm.runtime import launched, ranks

BUCKET_BYTES = 64 << 20
PATIENCE = timedelta(days=1)  # text may be tokenised for hours while the others wait; torchrun sees to processes that died

T = TypeVar("T")
C = TypeVar("C", bound=StageConfig)


def under_torchrun(stage: Callable[[C], int]) -> Callable[[C], int]:
    """The stage, as one of the processes that torchrun started, on a device of its own; without torchrun just the stage.

    What goes wrong is told by the process that it happens to first; the others end with exit code 2 and say nothing.
    """

    @functools.wraps(stage)
    def run(cfg: C) -> int:
        if not launched() or dist.is_initialized():
            return stage(cfg)
        store, rank, world = next(dist.rendezvous("env://"))
        gpu = cfg.device != "cpu" and torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, world_size=world, rank=rank, store=store)
        try:
            if gpu:
                here, gpus = dist.get_node_local_rank(), torch.cuda.device_count()
                check(here < gpus, f"torchrun started more processes than there are GPUs: at most {gpus} fit here")
                torch.cuda.set_device(here)
            code = stage(cfg)
        except BaseException:
            if store.add("fastlm/failed", 1) > 1:
                time.sleep(1)  # torchrun ends the others when one ends, and the first may still be telling
                raise SystemExit(2) from None
            raise
        dist.destroy_process_group()  # after an error it might wait for the others
        return code

    return run


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return ranks()[0] == 0


def console() -> Console:
    """Where the first process prints; silent in the others."""
    return Console(quiet=not is_main_process())


def devices(device: torch.device) -> str:
    """What the run is on, in words."""
    return f"{ranks()[1]} x {device}" if ranks()[1] > 1 else str(device)


def micro_rows(cfg: StageConfig) -> int:
    """Rows of one forward and backward pass of a process; UserError where a step's rows cannot be shared out equally."""
    world = ranks()[1]
    share = cfg.batch_rows // world
    check(cfg.batch_rows % world == 0, f"batch_rows is {cfg.batch_rows}, not a multiple of torchrun's {world} processes; "
          f"change --batch-rows, or start {one_of(divisors(cfg.batch_rows))} of them")  # fmt: skip
    rows = min(cfg.micro_rows, share)
    check(share % rows == 0, f"micro_batch_rows is {rows}, which does not divide the {share} rows that each of {world} "
          f"processes has in a step; choose it among {divisors(share)}")  # fmt: skip
    return rows


def one_of(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def shard(items: Iterable[T]) -> Iterator[T]:
    """This process's share of things done one at a time."""
    rank, world = ranks()
    return itertools.islice(items, rank, None, world)


def all_gather(value: T) -> list[T]:
    """What each process has, in their order, in all of them: for what is small and rare."""
    found: list[Any] = [value] * ranks()[1]
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them."""
    return all_gather(make() if is_main_process() else None)[0]  # type: ignore[return-value]


def merge_found(found: np.ndarray) -> np.ndarray:
    """What any process found, in all of them: fp32, NaN where it found nothing. What two found is the larger of the two."""
    if ranks()[1] == 1:
        return found
    array = torch.from_numpy(np.where(np.isnan(found), -np.inf, found))
    dist.all_reduce(array, dist.ReduceOp.MAX)
    return array.masked_fill_(array == -torch.inf, torch.nan).numpy()


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers; each waits here for all."""
    if ranks()[1] > 1:
        here = torch.tensor(number)
        dist.all_reduce(here, dist.ReduceOp.MAX)
        return int(here)
    return number


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process of each machine, then the others: for what is made once and then found, such as a cache."""
    behind = ranks()[1] > 1 and dist.get_node_local_rank(fallback_rank=0) > 0
    if behind:
        all_reduce_max(0)
    yield
    if not behind:
        all_reduce_max(0)


def all_reduce_counts(n_counted: int, figures: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """What is counted in all processes' rows of a step, and its figures: whole numbers add up, shares (float) are averaged.

    What is neither is known to all and stays.
    """
    world = ranks()[1]
    if world == 1:
        return n_counted, figures
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    sums = torch.tensor([n_counted, *numbers.values()], dtype=torch.float64)  # exact up to 2^53
    dist.all_reduce(sums)
    total, *found = sums.tolist()
    pairs = zip(numbers.items(), found, strict=True)
    return int(total), figures | {name: int(x) if isinstance(value, int) else x / world for (name, value), x in pairs}


def broadcast_parameters(model: nn.Module) -> None:
    """Give every process the main one's parameters and buffers: all start from the same bits.

    Unlike machines may make unlike ones of one seed.
    """
    if ranks()[1] == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), src=0)


def all_reduce_means(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each process's share of a step's means, added up: nothing leaves the device."""
    if ranks()[1] == 1:
        return means
    sums = torch.stack([part.float() for part in means.values()])
    dist.all_reduce(sums)
    return dict(zip(means, sums.unbind(), strict=True))


def all_reduce_gradients(model: nn.Module) -> None:
    """Add every gradient over the processes, all buckets under way at once; a tied parameter is one parameter."""
    if ranks()[1] == 1:
        return
    under_way = []
    for bucket in buckets(list(model.parameters())):
        # a parameter that this process's rows did not touch may be another's
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p)
        under_way.append(dist.all_reduce(flat, async_op=True))
    for work in under_way:
        work.wait()


def buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, in groups of about BUCKET_BYTES; what is larger stays alone."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and sum(q.nbytes for q in bucket) + p.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket

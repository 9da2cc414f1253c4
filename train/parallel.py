"""Training in several processes that torchrun started.

The only file of train/ that knows torch.distributed.

With R processes of which this is number r (0 is the first), a step of B rows in micro-batches of b
is that of one process,

    loss = sum over all rows of the loss / n_counted
    n_counted = sum over r of what is counted in process r's rows

and process r makes the micro-batches r, r + R, r + 2 R, ... of it. Gradients are added up over the
processes, not averaged.

    ddp   DistributedDataParallel: each holds the whole model; gradients are added, bucket by
          bucket, while the backward pass of the last micro-batch goes on.
    fsdp  fully_shard (FSDP2): each holds 1/R of every parameter, gradient and optimizer state; a
          block is gathered when it is needed. On a GPU in 16 bits; gradients are added in fp32.
    hsdp  fsdp inside a machine, ddp between machines.

The position in the data counts rows over all processes, so a run may go on with another number of
them, and in another of these ways. Plain numbers go through gloo, whatever the device: the GPUs are
never waited for. One process that torchrun did not start runs none of this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from fastlm import checkpoint, files
from fastlm.config import StageConfig
from fastlm.errors import UserError, check, divisors
from fastlm.runtime import launched, matmul_dtype, ranks

SHARD_ABOVE = (
    0.5  # auto: the share of a device's memory that weights, gradients and optimizer may take whole
)
BYTES_PER_PARAMETER = 16  # of these: fp32 weight and gradient, AdamW's two moments
PREPARING = timedelta(
    days=7
)  # for what is made once; a process that dies meanwhile is torchrun's to see
LAUNCH = ".launch"  # in a run's folder: which torchrun began it
MARK = ".shared"  # in the first process's folder: by which the others know it again
WAITS = "waits for the others"
GO_ON = "go on with --resume, or have torchrun do it: --max-restarts"

T = TypeVar("T")
C = TypeVar("C", bound=StageConfig)

# Whether the micro-batch that is under way is the last of its step.
_last: ContextVar[bool] = ContextVar("last", default=True)
_store: dist.Store | None = None  # torchrun's, as long as this process is one of its own
_turns = itertools.count()  # of main_process_first()
_sharers: dict[
    str, list[int]
] = {}  # the processes by the run folder that they see; empty: one for all


# ---------------------------------------------------------------- the group


def under_torchrun(stage: Callable[[C], int]) -> Callable[[C], int]:
    """The stage, as one of the processes that torchrun started, on a device of its own.

    Without torchrun just the stage.

    What goes wrong is told by the process that it happens to first; the others end with exit code 2
    and say nothing. When torchrun starts the processes again, the run goes on from its last
    checkpoint.
    """

    @functools.wraps(stage)
    def run(cfg: C) -> int:
        if not launched() or dist.is_initialized():
            return stage(cfg)
        gpu = cfg.device != "cpu" and torch.cuda.is_available()
        store = join("cpu:gloo,cuda:nccl" if gpu else "gloo", cfg.timeout_minutes)
        try:
            if gpu:
                here, gpus = dist.get_node_local_rank(), torch.cuda.device_count()
                check(
                    here < gpus,
                    f"torchrun started more processes than there are GPUs: at most {gpus} fit here",
                )
                torch.cuda.set_device(here)
            code = stage(going_on(cfg))
        except BaseException as error:
            signal.signal(
                signal.SIGTERM, signal.SIG_IGN
            )  # torchrun's, to all when one ends: the first may still be telling
            first = True
            with contextlib.suppress(dist.DistError):
                first = store.add("fastlm/failed", 1) == 1
            if not first:
                time.sleep(1)
                raise SystemExit(2) from None
            if is_lost_contact(error):
                raise UserError(
                    f"{who_is_missing(store, error, cfg.timeout_minutes)}; {GO_ON}"
                ) from None
            raise
        dist.destroy_process_group()  # after an error it might wait for the others
        return code

    return run


def join(backend: str, timeout_minutes: float) -> dist.Store:
    """Make this process one of torchrun's; returns what all of them can write to and read from."""
    global _store
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store for all its restarts, with what dead processes left in it
        store = dist.PrefixStore(f"fastlm/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    _store = store
    patience = timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, timeout=patience, world_size=world, rank=rank, store=_store)
    return _store


def is_lost_contact(error: BaseException) -> bool:
    """Whether another process could not be reached: the error is then not this one's."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def note(words: str) -> None:
    """Say what this process does, in case that the others wait for it in vain."""
    if _store is not None and ranks()[1] > 1:
        _store.set(f"fastlm/does/{ranks()[0]}", words)


def who_is_missing(store: dist.Store, error: BaseException, minutes: float) -> str:
    """Which process the others have lost, in words."""
    if "imed out" not in str(error) and "timeout" not in str(error):
        return (
            "another process ended without a word: killed, perhaps, for want of memory "
            "(torchrun's report names it)"
        )
    missing = []
    for rank in range(ranks()[1]):
        key = f"fastlm/does/{rank}"
        words = store.get(key).decode() if store.check([key]) else "has not begun"
        if words != WAITS:
            missing.append(f"process {rank}, which {words}")
    who = " and ".join(missing) or "a process"
    return f"waited {minutes:g} minutes (--timeout-minutes) for {who}"


def going_on(cfg: C) -> C:
    """cfg, or, where torchrun has started its processes again, cfg that resumes what they had
    begun.
    """
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not again or cfg.resume:
        return cfg
    places = [Path(cfg.out)] if cfg.out else sorted(Path("runs").glob("*"))
    ours = [
        place
        for place in places
        if (place / LAUNCH).is_file() and (place / LAUNCH).read_text() == launch_id()
    ]
    if all(all_gather(bool(ours) and bool(checkpoint.steps_saved(ours[0] / "checkpoints")))):
        return dataclasses.replace(cfg, resume=str(ours[0]))
    if ours and dist.get_node_local_rank() == 0:  # nothing is saved yet
        with contextlib.suppress(FileNotFoundError):
            files.remove_folder(ours[0])
    all_reduce_max(0)
    return cfg


def launch_id() -> str:
    """What tells this torchrun from all others, its own restarts not counted."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"process {os.getppid()}"


def joined() -> bool:
    """Whether this is one of torchrun's processes, be it the only one."""
    return dist.is_available() and dist.is_initialized()


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return ranks()[0] == 0


def console() -> Console:
    """Where the first process prints; silent in the others."""
    return Console(quiet=not is_main_process())


def devices(device: torch.device) -> str:
    """What the run is on, in words."""
    return f"{ranks()[1]} x {device}" if ranks()[1] > 1 else str(device)


# ---------------------------------------------------------------- the rows


def micro_rows(cfg: StageConfig) -> int:
    """Rows of one forward and backward pass of a process.

    UserError where a step's rows cannot be shared out equally.
    """
    world = ranks()[1]
    share = cfg.batch_rows // world
    check(
        cfg.batch_rows % world == 0,
        f"batch_rows is {cfg.batch_rows}, not a multiple of torchrun's {world} processes; "
        f"change --batch-rows, or start {one_of(divisors(cfg.batch_rows))} of them",
    )
    rows = min(cfg.micro_rows, share)
    check(
        share % rows == 0,
        f"micro_batch_rows is {rows}, which does not divide the {share} rows that each of {world} "
        f"processes has in a step; choose it among {divisors(share)}",
    )
    return rows


def one_of(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def shard(items: Iterable[T]) -> Iterator[T]:
    """This process's share of things done one at a time."""
    rank, world = ranks()
    return itertools.islice(items, rank, None, world)


def shard_evenly(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """This process's share of passes of the model, which all make together.

    As many in each, the surplus ones False.
    """
    rank, world = ranks()
    rest = iter(items)
    while turn := list(itertools.islice(rest, world)):
        yield turn[rank % len(turn)], rank < len(turn)


# ---------------------------------------------------------------- plain numbers


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
    """What any process found, in all of them: fp32, NaN where it found nothing.

    What two found is the larger of the two.
    """
    if ranks()[1] == 1:
        return found
    array = torch.from_numpy(np.where(np.isnan(found), -np.inf, found))
    dist.all_reduce(array, dist.ReduceOp.MAX)
    return array.masked_fill_(array == -torch.inf, torch.nan).numpy()


def all_reduce_max(*numbers: int) -> list[int]:
    """The largest of the processes' numbers, one by one; each waits here for all."""
    if ranks()[1] > 1:
        note(WAITS)
        here = torch.tensor(numbers)
        dist.all_reduce(here, dist.ReduceOp.MAX)
        return here.tolist()
    return list(numbers)


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process of each machine, then the others.

    For what is made once and then found, such as a cache.

    All wait here for all machines, for as long as it takes: text may be tokenised for hours.
    """
    if _store is None or ranks()[1] == 1:
        yield
        return
    turn = next(_turns)
    machines = [
        f"fastlm/prepared/{turn}/{name}" for name in range(int(os.environ["GROUP_WORLD_SIZE"]))
    ]
    mine = machines[int(os.environ["GROUP_RANK"])]
    leads = dist.get_node_local_rank() == 0
    if not leads:
        _store.wait([mine], PREPARING)
    yield
    if leads:
        _store.set(mine, "")
    _store.wait(machines, PREPARING)


def all_reduce_counts(n_counted: int, figures: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """What is counted in all processes' rows of a step, and its figures.

    Whole numbers add up, shares (float) are averaged.

    What is neither is known to all and stays.
    """
    world = ranks()[1]
    if world == 1:
        return n_counted, figures
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    sums = torch.tensor([n_counted, *numbers.values()], dtype=torch.float64)  # exact up to 2^53
    note(WAITS)
    dist.all_reduce(sums)
    total, *found = sums.tolist()
    pairs = zip(numbers.items(), found, strict=True)
    return int(total), figures | {
        name: int(x) if isinstance(value, int) else x / world for (name, value), x in pairs
    }


def all_reduce_means(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each process's share of a step's means, added up: nothing leaves the device."""
    if ranks()[1] == 1:
        return means
    sums = torch.stack([part.float() for part in means.values()])
    dist.all_reduce(sums)
    return dict(zip(means, sums.unbind(), strict=True))


# ---------------------------------------------------------------- the run's folder


def settle_folder(folder: Path, model: nn.Module, claim: Callable[[], Path]) -> Path:
    """Find out which processes share the folder that the first one has.

    The others' machines each have one of their own.

    claim: makes the folder where it is not there. A checkpoint is whole in every folder, which is
    why a model that is sharded over all machines needs a shared one.
    """
    global _sharers
    if not joined():
        return folder
    text = broadcast_from_main(lambda: f"{launch_id()}\n{secrets.token_hex(8)}")
    if is_main_process():
        files.write_text(folder / MARK, text)
    all_reduce_max(0)
    shared = (folder / MARK).is_file() and (folder / MARK).read_text() == text
    homes = all_gather("shared" if shared else os.environ["GROUP_RANK"])
    _sharers = {
        home: [rank for rank, other in enumerate(homes) if other == home]
        for home in dict.fromkeys(homes)
    }
    mesh = getattr(next(model.parameters()), "device_mesh", None)
    check(
        len(_sharers) == 1 or mesh is None or mesh.ndim == 2,
        f"not all machines share {folder}, and none has the whole "
        "model; choose --parallel hsdp or ddp, or a folder that all share",
    )
    if writes():
        if not shared:
            folder = claim()
        files.write_text(folder / LAUNCH, launch_id())
    all_reduce_max(0)
    return folder


def sharers() -> list[int]:
    """The processes that share this one's run folder."""
    rank, world = ranks()
    return next((some for some in _sharers.values() if rank in some), list(range(world)))


def writes() -> bool:
    """Whether this process writes what its run folder holds, beside its parts of checkpoints."""
    return ranks()[0] == sharers()[0]


def all_gather_in_folder(value: T) -> list[T]:
    """What each process has that shares this one's folder."""
    found = all_gather(value)
    return [found[rank] for rank in sharers()]


def from_writer(make: Callable[[], T]) -> T:
    """What the process that writes makes, in all that share its folder."""
    return all_gather_in_folder(make() if writes() else None)[0]  # type: ignore[return-value]


def number_among_writers() -> int:
    """This process's number among those that share its folder."""
    return sharers().index(ranks()[0])


def saving_group() -> dist.ProcessGroup:
    """The processes that share this one's folder, to talk about checkpoints while the others talk
    about steps.
    """
    homes = _sharers.values() or [sharers()]
    groups = {
        some[0]: dist.new_group(some, backend="gloo") for some in homes
    }  # each must be made by all
    return groups[sharers()[0]]


# ---------------------------------------------------------------- the model


def distribute(cfg: StageConfig, model: nn.Module, device: torch.device) -> None:
    """Give every process the first one's parameters and buffers, all or its part of each, as
    cfg.parallel says.

    All start from the same bits: unlike machines may make unlike ones of one seed.
    """
    if not joined():
        return
    for tensor in (*model.parameters(), *model.buffers()) if ranks()[1] > 1 else ():
        dist.broadcast(tensor.detach(), src=0)
    way = cfg.parallel
    if way == "auto":
        way = "ddp" if fits_whole(model, device) else "fsdp"
    world = ranks()[1]
    words = f"each with the whole model and its optimizer, {way}"
    if way != "ddp":
        mesh = sharding_mesh(way, device)
        words = f"each with 1/{mesh.size(mesh.ndim - 1)} of the model and its optimizer, {way}"
        fully_shard_blocks(model, mesh, device, cfg.reshard_after_forward)
    console().print(f"Processes: {world}, {words}", highlight=False)


def fits_whole(model: nn.Module, device: torch.device) -> bool:
    """Whether every process's device has room for the model, its gradients and its optimizer."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_processes()
    needed = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    return needed <= SHARD_ABOVE * min(all_gather(memory))


def local_processes() -> int:
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def sharding_mesh(way: str, device: torch.device) -> dist.DeviceMesh:
    """fsdp: all processes in one row; hsdp: a row for each machine.

    Parameters are sharded along rows.
    """
    world, here = ranks()[1], local_processes()
    if way == "fsdp":
        return dist.init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    check(
        world % here == 0 and len(set(all_gather(here))) == 1,
        "hsdp needs as many processes on every machine",
    )
    return dist.init_device_mesh(
        device.type, (world // here, here), mesh_dim_names=("replicate", "shard")
    )


def fully_shard_blocks(
    model: nn.Module, mesh: dist.DeviceMesh, device: torch.device, reshard: bool
) -> None:
    """Shard the model in place, block by block, so that one block at a time is whole.

    reshard: a block is freed after its forward pass and gathered again for its backward pass.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    dtype = matmul_dtype(device)
    # The inputs stay as they are: rotary tables in fp16 are twice as fine as in bf16.
    policy = MixedPrecisionPolicy(
        None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # What belongs to no block, embedding and head, is used first and last: freed in between only to
    # save memory.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # gradients are added up, not averaged
            part.set_force_sum_reduction_for_comms(True)  # which is a plain sum: gloo has no other
    for method in ("loss", "logprobs", "run"):
        register_fsdp_forward_method(model, method)


def shards(model: nn.Module) -> list[Any]:
    """The parts of a sharded model that are gathered at once; none where the model is whole."""
    if not joined():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free what passes without a backward pass have left gathered.

    The parameters are then the optimizer's again.
    """
    for part in shards(model):
        part.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, a sharded model is whole in every process, for what reads its parameters itself."""
    for part in shards(model):
        part.set_reshard_after_forward(False)
        part.unshard()
    yield
    reshard(model)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, in all processes; a whole one itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---------------------------------------------------------------- the step


class Forward(nn.Module):
    """A model whose forward is a function of it: DistributedDataParallel knows no other."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *args: Any, **options: Any) -> Tensor:
        return self.function(*args, **options)


def training_step(
    cfg: StageConfig, model: nn.Module, function: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """A function of the model as training calls it, inside of micro_batch().

    Gradients end up added over the processes.

    ddp: after the last micro-batch. Sharded: after each, so that gradients stay sharded too; where
    memory is plentiful (no reshard_after_forward) after the last, and between machines always after
    the last.
    """
    if shards(model):

        def sharded(*args: Any, **options: Any) -> Tensor:
            model.set_requires_gradient_sync(_last.get() or cfg.reshard_after_forward)  # type: ignore[operator]
            model.set_requires_all_reduce(_last.get())  # type: ignore[operator]
            return function(*args, **options)

        return sharded
    forward = Forward(model, function)
    constant = [name for name, _ in forward.named_buffers()]
    ddp_class = nn.parallel.DistributedDataParallel
    ddp_class._set_params_and_buffers_to_ignore_for_model(forward, constant)
    ddp = ddp_class(forward, init_sync=False, gradient_as_bucket_view=True)
    ddp.register_comm_hook(None, add_up)

    def replicated(*args: Any, **options: Any) -> Tensor:
        with contextlib.nullcontext() if _last.get() else ddp.no_sync():
            return ddp(*args, **options)

    return replicated


# PyTorch reads a hook's annotations, and not from text: there are none.
def add_up(state, bucket):  # type: ignore[no-untyped-def]
    """A bucket of gradients (dist.GradBucket), added over the processes: a future of the sums."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


@contextmanager
def micro_batch(last: bool) -> Iterator[None]:
    """Around a forward and its backward pass, or a forward pass without one (last=False)."""
    token = _last.set(last)
    try:
        yield
    finally:
        _last.reset(token)


def norms_of_shards(model: nn.Module, norm: Tensor) -> Tensor:
    """The norm of each process's part of a sharded model's gradients.

    The norm of these is the norm of all.
    """
    mesh = next(model.parameters()).device_mesh  # type: ignore[attr-defined]
    norms = norm.new_empty(mesh.size(mesh.ndim - 1))
    dist.all_gather(list(norms.split(1)), norm.view(1), mesh.get_group(mesh.ndim - 1))
    return norms


def each_matrix_once(
    stacks: list[Tensor], like: list[Tensor], work: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """work(stacks) of stacks of matrices (L, m, n), each matrix done by one process.

    like: for each stack a parameter, a tensor that every process has whole or one that is sharded
    by rows; the stack is what this process has of such matrices, and so is what is returned. work
    gets whole matrices, and may get none.
    """
    rank, world = ranks()
    if world == 1:
        return work(stacks)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    first: Any = like[0]
    sharded = isinstance(first, DTensor)
    mesh = first.device_mesh if sharded else whole_mesh(first.device.type)
    everywhere, by_matrix = [Replicate()] * mesh.ndim, [Shard(0)] * mesh.ndim
    by_rows = [Shard(1) if q.is_shard() else q for q in first.placements] if sharded else everywhere
    shapes = [torch.Size((len(stack), *p.shape)) for stack, p in zip(stacks, like, strict=True)]

    def moved(parts: list[Tensor], before: list[Any], after: list[Any]) -> Iterator[Tensor]:
        for part, shape in zip(parts, shapes, strict=True):
            tensor = distributed(part, mesh, before, shape)
            if (
                mesh.device_type == "cpu"
            ):  # gloo has no all-to-all; PyTorch would gather too, and warn
                tensor = tensor.redistribute(placements=everywhere)
            yield tensor.redistribute(placements=after).to_local()

    if sharded:
        mine = list(moved(stacks, by_rows, by_matrix))
    else:  # no copy: where a matrix lies in memory is worth a bit to some BLAS libraries
        shares = [-(-len(stack) // world) for stack in stacks]
        mine = [stack[rank * n : (rank + 1) * n] for stack, n in zip(stacks, shares, strict=True)]
    return list(moved(work(mine), by_matrix, by_rows))


def distributed(
    part: Tensor, mesh: dist.DeviceMesh, placements: list[Any], shape: torch.Size
) -> Any:
    """The tensor of this shape of which each process has a part, contiguous."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
    )


@functools.cache
def whole_mesh(kind: str) -> dist.DeviceMesh:
    """All processes in one row."""
    return dist.init_device_mesh(kind, (ranks()[1],))

"""A checkpoint in parts: each process writes what it holds, any number of processes reads it.

Written and read by torch.distributed.checkpoint:

    step-000150/
      shard-00001-model-00001-of-00001.safetensors     what the first process holds, and so on
      state.json                                       as in a checkpoint of one process

A part is a safetensors file that says in its header where in the whole tensors its own lie. Nothing
is pickled. A tensor that several processes hold is written by one of them. Reading needs no other
process.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

PART = re.compile(r"shard-(\d{5})-model-00001-of-00001\.safetensors")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a whole one itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def name_of(number: int) -> str:
    """The file of process number `number` (0 is the first)."""
    return f"shard-{number + 1:05d}-model-00001-of-00001.safetensors"


def are_parts(names: Iterable[str]) -> bool:
    """Whether these are names of parts, and there are any."""
    return all(map(PART.fullmatch, names)) and bool(list(names))


def begin_to_write(folder: Path, tensors: dict[str, Tensor], group: Any) -> Future:
    """Copy the tensors and write this process's part of them into the folder, while the caller goes
    on.

    group: a process group on CPUs that nothing else uses meanwhile; its processes all call this.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    response = async_save(dict(tensors), storage_writer=writer, process_group=group)
    return response if isinstance(response, Future) else response.upload_completion


def read_metadata(folder: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors of which the folder holds parts.

    OSError or SafetensorError where it cannot be read.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in found.items()}  # type: ignore[union-attr]


def read(folder: Path, wanted: dict[str, Tensor]) -> None:
    """Fill these tensors, whole or sharded.

    Raises OSError or SafetensorError where a part cannot be read.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def copy_whole(into: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if hasattr(into, "to_local"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        # each process has the whole tensor, and nothing needs to be sent
        sharded = cast(DTensor, into)
        whole = distribute_tensor(
            whole.to(into.device), sharded.device_mesh, sharded.placements, src_data_rank=None
        )
    into.copy_(whole)

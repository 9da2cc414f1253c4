"""Batches ready on the GPU before the step that needs them.

A thread makes the next batches and pins them; their copy to the GPU is queued on a stream of its own while the step before
still computes. The step then waits for nothing on the host, and on the device only for a copy that is long done.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastlm.data.packing import PackedBatch

_END = object()


def prefetch(batches: Iterable[Any], device: torch.device | str, depth: int = 2) -> Iterator[Any]:
    """The same batches, in order, on the device; each a tensor, a tuple of tensors, or a PackedBatch.

    On a GPU up to `depth` batches are made ahead in a thread, in pinned memory, and one more is being copied. On a CPU they
    are passed through: making one costs less than a thread. An error in making a batch is raised where it would be used.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    ready: Any = None
    for batch in in_thread((pin(batch) for batch in batches), depth):
        with torch.cuda.stream(stream):
            copied = move(batch, device), batch, stream.record_event()  # the pinned batch lives until it is copied
        if ready is not None:
            yield _take(*ready)
        ready = copied
    if ready is not None:
        yield _take(*ready)


def _take(batch: Any, pinned: Any, event: Any) -> Any:
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for tensor in tensors(batch):
        tensor.record_stream(current)
    return batch


def in_thread(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The items, made ahead by a thread that keeps `depth` of them waiting; it ends when the reader stops."""
    waiting: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # handed to the reader, who raises it
            put((_END, error))

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def tensors(batch: Any) -> list[torch.Tensor]:
    """The tensors of a batch."""
    if isinstance(batch, PackedBatch):
        return [batch.x, batch.y, batch.positions, batch.cu_seqlens, batch.unit]
    return [batch] if isinstance(batch, torch.Tensor) else list(batch)


def pin(batch: Any) -> Any:
    """The batch in pinned memory."""
    if isinstance(batch, torch.Tensor | PackedBatch):
        return batch.pin_memory()
    return tuple(tensor.pin_memory() for tensor in batch)


def move(batch: Any, device: torch.device) -> Any:
    """The batch on the device, without waiting for the copy."""
    if isinstance(batch, torch.Tensor | PackedBatch):
        return batch.to(device, non_blocking=True)
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)

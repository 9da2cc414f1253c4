"""Batches ready on the GPU before the step that needs them.

A thread makes the next batches and pins them; their copy to the GPU is queued on a stream of its
own while the step before still computes. The step then waits for nothing on the host, and on the
device only for a copy that is long done.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_END = object()


def prefetch(batches: Iterable[Any], device: torch.device | str, depth: int = 2) -> Iterator[Any]:
    """The same batches, in order, on the device.

    A batch is tensors in tuples, lists and dicts, beside plain values. On a GPU up to `depth`
    batches are made ahead in a thread, in pinned memory, and one more is being copied. On a CPU
    they are passed through: making one costs less than a thread. An error in making a batch is
    raised where it would be used.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    gpu = torch.cuda.current_device() if device.index is None else device.index
    ready: Any = None
    for batch in in_thread(pinned(batches, gpu), depth):
        with torch.cuda.stream(stream):
            # The pinned batch lives until it is copied.
            copied = move(batch, device), batch, stream.record_event()
        if ready is not None:
            yield _take(*ready)
        ready = copied
    if ready is not None:
        yield _take(*ready)


def _take(batch: Any, pinned: Any, event: Any) -> Any:
    """The copied batch, which the current stream now waits for, and keeps from being reused."""
    current = torch.cuda.current_stream()
    current.wait_event(event)

    def keep(tensor: Tensor) -> Tensor:
        tensor.record_stream(current)
        return tensor

    return apply(keep, batch)


def in_thread(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The items, `depth` of them made ahead by a thread, which ends when the reader stops."""
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


def apply(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with the function applied to each tensor, however deep it lies."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(apply(function, part) for part in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(apply(function, part) for part in batch)
    if isinstance(batch, dict):
        return {name: apply(function, part) for name, part in batch.items()}
    return batch


def pinned(batches: Iterable[Any], gpu: int) -> Iterator[Any]:
    """The batches in pinned memory, for a thread to make."""
    # A new thread is on GPU 0, where pinning would take memory for every process.
    torch.cuda.set_device(gpu)
    for batch in batches:
        yield pin(batch)


def pin(batch: Any) -> Any:
    """The batch in pinned memory."""
    return apply(Tensor.pin_memory, batch)


def move(batch: Any, device: torch.device) -> Any:
    """The batch on the device, without waiting for the copy."""
    return apply(lambda tensor: tensor.to(device, non_blocking=True), batch)

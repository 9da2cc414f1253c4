"""Batches made ahead arrive in order, errors come through, and the thread ends with its reader."""

import threading
import time

import pytest
import torch

from fastlm.data import prefetch as module
from fastlm.data.prefetch import in_thread, pinned, prefetch


def test_on_a_cpu_batches_pass_through():
    batches = [(torch.full((2,), n), torch.full((2,), -n)) for n in range(5)]
    assert [b[0][0].item() for b in prefetch(iter(batches), "cpu")] == list(range(5))


def test_items_are_made_ahead_in_order():
    made = []

    def items():
        for n in range(6):
            made.append(n)
            yield n

    reader = in_thread(items(), 2)
    assert next(reader) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1, 2, 3]  # one given, two waiting, one made and not yet taken
    assert list(reader) == [1, 2, 3, 4, 5]


def test_an_error_is_raised_where_the_batch_would_be_used():
    def items():
        yield 1
        raise ValueError("bad row")

    reader = in_thread(items(), 2)
    assert next(reader) == 1
    with pytest.raises(ValueError, match="bad row"):
        next(reader)


def test_the_thread_ends_when_the_reader_stops():
    reader = in_thread(iter(range(10**9)), 2)
    next(reader)
    reader.close()
    assert not [t for t in threading.enumerate() if t.name == "batches"]


def test_the_thread_pins_on_its_own_gpu(monkeypatch):
    happened = []
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda gpu: happened.append((gpu, threading.current_thread().name)),
    )
    monkeypatch.setattr(module, "pin", lambda batch: happened.append(batch) or batch)
    assert list(in_thread(pinned(["a", "b"], 3), 2)) == ["a", "b"]
    assert happened == [(3, "batches"), "a", "b"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_arrive_whole_and_in_order():
    batches = [(torch.full((64, 1024), n), torch.full((64, 1024), -n)) for n in range(20)]
    for n, (x, y) in enumerate(prefetch(iter(batches), "cuda")):
        torch.cuda._sleep(1_000_000)  # the device is behind the host, as in a training step
        assert x.is_cuda
        assert (x == n).all().item()
        assert (y == -n).all().item()

"""The loss and the log-probabilities behind the head's matmul on a GPU: time and memory.

Against every peer and the matmuls, forward and backward, bf16, modern-253m's head: (N, 1024) x
(1024, 50257). The ceiling is the matmuls alone, 3 for the loss and 4 for the log-probabilities
(whose backward makes the logits again). Without a GPU every case runs once, small.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache

import pytest
import torch

from bench.harness.gpu_timing import (
    FAILURES,
    device,
    in_turns,
    on_gpu,
    on_stream,
    peak_bytes,
    rehearsing,
    say,
)
from bench.peers.gpu import heads, plain_head, plain_logprobs
from fastlm.kernels import linear_cross_entropy, linear_logprobs

MATMULS = {"loss": 3, "logprobs": 4}


def size(measuring: bool) -> tuple[int, int, int]:
    """(N, D, V): 32,768 tokens where their plain logits fit in the GPU's memory, else fewer.

    The logits take 10 GB in bf16 and fp32.
    """
    if not measuring or rehearsing():
        return 5, 32, 200
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return (32768 if gib > 70 else 8192 if gib > 20 else 2048), 1024, 50257


@cache
def compiled(function: Callable) -> Callable:
    return torch.compile(
        function, dynamic=False, fullgraph=True, backend="inductor" if on_gpu() else "eager"
    )


def call(
    function: Callable, shape: tuple[int, int, int], upstream_rows: bool
) -> Callable[[], object]:
    """A forward and a backward of function(h, weight, targets)."""
    n, d, v = shape
    options = {"device": device(), "dtype": torch.bfloat16}
    h, weight = (
        torch.randn(n, d, **options).requires_grad_(),
        torch.randn(v, d, **options).mul_(0.02).requires_grad_(),
    )
    targets = torch.randint(v, (n,), device=device())
    upstream = torch.randn(n, device=device()) if upstream_rows else None
    return lambda: torch.autograd.grad(function(h, weight, targets), [h, weight], upstream)


def matmuls(shape: tuple[int, int, int], count: int) -> Callable[[], object]:
    """The head's matmuls and nothing else: the logits once or twice, dh and dW from them."""
    n, d, v = shape
    options = {"device": device(), "dtype": torch.bfloat16}
    h, weight, logits = (torch.randn(s, **options) for s in ((n, d), (v, d), (n, v)))

    def run():
        for _ in range(count - 2):
            torch.mm(h, weight.t(), out=logits)
        return logits @ weight, logits.t() @ h

    return run


@pytest.mark.parametrize("what", ["loss", "logprobs"])
def test_gpu_head(what, measuring, record, benchmark, kernels_on_device):
    shape = size(measuring)
    n, d, v = shape
    functions: dict[str, Callable] = {"ours": linear_cross_entropy}
    if what == "loss":
        for name, (function, why) in heads().items():
            if why:
                record(peer=name, missing=why)
            else:
                functions[name] = function
        functions["inductor"] = compiled(plain_head)
    else:
        functions = {
            "ours": linear_logprobs,
            "eager": plain_logprobs,
            "inductor": compiled(plain_logprobs),
        }
    turns, memory, failed = {}, {}, []
    for name, function in functions.items():
        try:
            with on_stream():
                turn = call(function, shape, what == "logprobs")
                turn()
            memory[name] = [peak_bytes(turn) / 2**30]
            turns[name] = turn
        except FAILURES as error:
            record(peer=name, failed=say(error))
            failed.append(name)
    with on_stream():
        turns["matmul"] = matmuls(shape, MATMULS[what])
    times = {}
    benchmark.pedantic(lambda: times.update(in_turns(turns, 10)))
    flops = 2 * MATMULS[what] * n * d * v
    speed = {
        name: {"tflop_per_second": flops / 1e9 / statistics.median(ms)}
        for name, ms in times.items()
    }
    record(times, unit="ms", measures=speed)
    if on_gpu():
        record(memory, unit="extra GiB")
    assert "ours" not in failed, "ours failed: its row says why"

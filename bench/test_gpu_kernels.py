"""Each fused operation on a GPU: forward, backward and both, against all its peers and a copy.

bf16, random inputs, cold caches (harness/gpu_timing.py). gb: what an operation must move at least,
each operand once; gb_per_second and share_of_copy are by that count. Without a GPU every case runs
once, small, with Triton's interpreter.
"""

from __future__ import annotations

import statistics
from functools import cache, partial

import pytest
import torch

from bench.harness.gpu_timing import (
    FAILURES,
    NOT_INTERPRETED,
    copies,
    device,
    in_turns,
    on_gpu,
    recorded,
    rehearsing,
    say,
)
from bench.peers.gpu import absent, liger
from bench.peers.operations import OURS, PLAIN, a_copy, inputs, moved, part_of

SHAPES = {
    "rms_norm": [(4096, 1024), (32768, 1024), (8192, 4096)],
    "add_rms_norm": [(4096, 1024), (32768, 1024)],
    "swiglu": [(4096, 4096), (32768, 4096)],
    "rope": [(4096, 1024), (32768, 1024)],
    "cross_entropy": [(8192, 50257)],
}
CASES = [
    pytest.param(op, shape, id=f"{op}-{shape[0]}x{shape[1]}")
    for op, shapes in SHAPES.items()
    for shape in shapes
]
OPTIONS = {"dtype": torch.bfloat16}


@cache
def compiled(op: str):
    """One compiled function for all parts and shapes of an operation; eager in a rehearsal."""
    backend = "inductor" if on_gpu() else "eager"
    return torch.compile(PLAIN[op], dynamic=False, fullgraph=True, backend=backend)


@pytest.mark.parametrize("part", ["forward", "backward", "both"])
@pytest.mark.parametrize(("op", "shape"), CASES)
def test_gpu_kernel(op, shape, part, measuring, record, benchmark, kernels_on_device):
    rows, width = shape if measuring and not rehearsing() else (3, 128)
    size = moved(op, rows, width, part)
    options = OPTIONS | {"device": device()}
    builds = {
        "ours": lambda: part_of(OURS[op], inputs(op, rows, width, **options), part),
        "eager": lambda: part_of(PLAIN[op], inputs(op, rows, width, **options), part),
        "inductor": lambda: part_of(compiled(op), inputs(op, rows, width, **options), part),
        "liger": lambda: part_of(*liger(op, inputs(op, rows, width, **options)), part),
        "copy": partial(a_copy, size, **options),
    }
    if why := absent("liger-kernel", "liger_kernel"):
        record(peer="liger", missing=why)
        del builds["liger"]
    sets = copies(2 * size)
    turns, methods, failed = {}, {}, []
    for name, build in builds.items():
        try:
            turns[name], methods[name] = recorded(build, sets)
        except FAILURES as error:
            if name == "liger" and isinstance(error, NOT_INTERPRETED):
                record(peer=name, missing=f"Triton's interpreter cannot run it: {say(error)}")
                continue
            record(peer=name, failed=say(error))
            failed.append(name)
    times = {}
    benchmark.pedantic(lambda: times.update(in_turns(turns, 20, sets)))
    middle = {name: statistics.median(ms) for name, ms in times.items()}
    figures = {}
    for name, ms in middle.items():
        rate = 2 * size / 1e6 / ms
        share = middle["copy"] / ms
        figures[name] = {"gb": 2 * size / 1e9, "gb_per_second": rate, "share_of_copy": share}
    record(times, unit="ms", measures=figures, notes=methods)
    assert "ours" not in failed, "ours failed: its row says why"

"""Each op on the CPU against eager PyTorch, against Inductor, and against a copy of as many bytes."""

from __future__ import annotations

import pytest
import torch
from operations import OPS, OURS, PLAIN, a_copy, inputs, moved, part_of

from fastlm.kernels.cpu import keep_large_blocks


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(8192, 1024), (2048, 4096)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_cpu_op(shape, op, part, measuring, take_turns):
    keep_large_blocks()
    torch._dynamo.reset()
    rows, width = shape if measuring else (16, 128)
    given = inputs(op, rows, width)
    rivals = {"eager": part_of(PLAIN[op], given, part), "copy": a_copy(moved(op, rows, width, part))}
    if measuring:
        rivals["inductor"] = part_of(torch.compile(PLAIN[op], dynamic=False), given, part)
    take_turns(part_of(OURS[op], given, part), rivals, rounds=15)

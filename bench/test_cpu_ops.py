"""Each op on the CPU against eager PyTorch, Inductor and a copy; attention against PyTorch's."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F

from bench.peers.operations import OPS, OURS, PLAIN, a_copy, inputs, moved, part_of
from fastlm.kernels.attention import attention
from fastlm.kernels.native import keep_large_blocks

# rows, tokens, heads, key/value heads: of the 30M model, of a 135M one, of a long text
ATTENTION = {
    "8x256, 6 heads": (8, 256, 6, 6),
    "4x1024, 9 and 3 heads": (4, 1024, 9, 3),
    "1x4096, 6 heads": (1, 4096, 6, 6),
}


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(8192, 1024), (2048, 4096)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_cpu_op(shape, op, part, measuring, take_turns):
    keep_large_blocks()
    torch._dynamo.reset()
    rows, width = shape if measuring else (16, 128)
    given = inputs(op, rows, width)
    rivals = {
        "eager": part_of(PLAIN[op], given, part),
        "copy": a_copy(moved(op, rows, width, part)),
    }
    if measuring:
        rivals["inductor"] = part_of(torch.compile(PLAIN[op], dynamic=False), given, part)
    take_turns(part_of(OURS[op], given, part), rivals, rounds=15)


def torch_attention(q, k, v):
    """PyTorch's on the same tensors, (B, T, heads, Dh)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("shape", ATTENTION.values(), ids=ATTENTION)
def test_cpu_attention(shape, part, measuring, take_turns, add_measures):
    """Causal attention in plain rows, heads of 64 numbers."""
    keep_large_blocks()
    rows, length, heads, kv_heads = shape
    length = length if measuring else 8
    given = [torch.randn(rows, length, n, 64) for n in (heads, kv_heads, kv_heads)]
    found = take_turns(
        part_of(attention, (given, []), part),
        {"eager": part_of(torch_attention, (given, []), part)},
        rounds=15,
    )
    if found:  # the forward has 2 products of T^2 / 2 x Dh, the backward 5
        flops = (2 if part == "forward" else 5) * rows * heads * length**2 * 64
        add_measures(gflops=flops / statistics.median(found["ours"]) / 1e9)

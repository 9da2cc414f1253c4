"""The counts of compiled GPU programs against what can be worked out by hand.

Run by test_instruments.py, in a process of its own; on the stand-in GPU tensors are on cuda.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpucompile import DEVICE, compile_for_gpu
from gpureport import Report


def total_flops(report: Report) -> int:
    return sum(node.flops for graph in report.graphs for node in graph.nodes)


def test_norm_and_activation_fuse_into_one_kernel_at_the_traffic_floor():
    def step(x, w):
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return F.silu(x * rstd.to(x.dtype) * w)

    def build():
        return torch.empty(4096, 1024, dtype=torch.bfloat16), torch.empty(1024).bfloat16()

    (graph,) = compile_for_gpu(step, build).graphs
    assert len(graph.kernels) == graph.launches.total() == 1
    assert not graph.externs
    assert graph.generated_bytes == 2 * (2 * 4096 * 1024 + 1024)


def mlp_step(dim: int, ffn_dim: int):
    """A step through two linear layers, and what makes the model and an input of so many rows."""
    box = {}

    def build(rows: int):
        up = torch.nn.Linear(dim, ffn_dim, bias=False)
        down = torch.nn.Linear(ffn_dim, dim, bias=False)
        box["model"] = torch.nn.Sequential(up, torch.nn.GELU(), down)
        return (torch.empty(rows, dim, requires_grad=True),)

    return lambda x: box["model"](x).square().mean(), build


def test_a_training_step_has_three_matmuls_per_weight_and_six_flops_per_parameter_and_token():
    step, build = mlp_step(512, 2048)
    report = compile_for_gpu(step, lambda: build(1024))
    assert [graph.which for graph in report.graphs] == ["forward", "backward"]
    assert sum(graph.externs["mm"] for graph in report.graphs) == 6
    assert total_flops(report) == 6 * 1024 * 2 * 512 * 2048
    assert all("tl.load" in source for source in report.kernels().values())
    assert report.projected_ms()["sum"] > 0


def test_size_costs_nothing():
    step, build = mlp_step(16384, 65536)  # 8.6 GB of weights
    assert total_flops(compile_for_gpu(step, lambda: build(65536))) > 1e14


def test_a_graph_break_and_a_host_sync_are_errors():
    def breaks(x):
        print("here")
        return x.sum()

    def waits(x):
        return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(Exception, match="(?i)break|unsupported|builtin"):
        compile_for_gpu(breaks, lambda: (torch.empty(8),))
    with pytest.raises(Exception, match="(?i)item|data-dependent|break"):
        compile_for_gpu(waits, lambda: (torch.empty(8),))


@torch.library.custom_op("gpuless::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, grad: twice(grad))


def test_a_custom_op_stays_an_extern_call_in_both_directions():
    def build():
        return (torch.empty(64, 64, requires_grad=True),)

    report = compile_for_gpu(lambda x: twice(x).square().sum(), build)
    calls = [graph.externs["gpuless.twice.default"] for graph in report.graphs]
    assert calls == [1, 1]
    node = report.graphs[0].nodes[0]
    assert node.input_bytes == node.output_bytes == 64 * 64 * 4


def test_attention_is_the_operator_of_the_device_that_traces():
    def build():
        shape = (2, 4, 128, 64)
        return tuple(torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")

    def step(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).float().sum()

    report = compile_for_gpu(step, build)
    names = " ".join(name for graph in report.graphs for name in graph.externs)
    if DEVICE.type == "cuda":
        assert "scaled_dot_product_cudnn_attention.default" in names  # on an H100
        assert total_flops(report) == 7 * 2 * 2 * 4 * 128 * 128 * 64  # two products, then five
    else:
        assert "scaled_dot_product_flash_attention_for_cpu" in names


def test_torch_is_itself_again_afterwards():
    there = torch.cuda.is_available()
    compile_for_gpu(lambda x: x.sum(), lambda: (torch.empty(8),))
    assert torch.cuda.is_available() == there
    assert torch.equal(~torch.tensor([True, False]), torch.tensor([False, True]))
    assert torch.equal(torch.zeros(3).copy_(torch.ones(3)), torch.ones(3))


def test_what_the_forward_saves_is_counted():
    def build():
        return torch.empty(128, 64, requires_grad=True), torch.empty(64, 256, requires_grad=True)

    report = compile_for_gpu(lambda x, w: F.silu(x @ w).sum(), build)
    loss, product = 4, 128 * 256 * 4  # silu's backward needs the product
    assert report.graphs[0].saved_bytes == loss + product
    assert report.custom_ops() == {}

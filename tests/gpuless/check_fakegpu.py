"""PyTorch's CUDA build on the stand-in GPU. Run by rehearse.py, on the stand-in."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


def since(before: dict[str, int]) -> dict[str, int]:
    return {name: n - before[name] for name, n in torch.fakegpu_counts().items()}


def test_pytorch_reads_the_properties_where_they_were_written():
    """The names on the left are read by code that was compiled with NVIDIA's own declaration."""
    found = torch.cuda.get_device_properties(0)
    expected = {
        "name": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "minor": 0,
        "total_memory": 79 << 30,
        "multi_processor_count": 132,
        "max_threads_per_multi_processor": 2048,
        "warp_size": 32,
        "regs_per_multiprocessor": 65536,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_block_optin": 227 << 10,
        "shared_memory_per_multiprocessor": 228 << 10,
        "L2_cache_size": 50 << 20,
        "is_integrated": 0,
        "is_multi_gpu_board": 0,
    }
    assert {name: getattr(found, name) for name in expected} == expected
    assert torch.cuda.is_bf16_supported(including_emulation=False)


def test_a_compiled_step_runs_without_syncs():
    up, down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
    model = torch.nn.Sequential(up, torch.nn.GELU(), down).cuda()
    step = torch.compile(lambda x: model(x).square().mean(), fullgraph=True)
    x = torch.randn(32, 64, device="cuda")
    step(x).backward()
    before = torch.fakegpu_counts()
    for _ in range(10):
        step(x).backward()
    asked = since(before)
    assert all(p.grad.is_cuda for p in model.parameters())
    assert asked["stream syncs"] == asked["device syncs"] == asked["copies to the host"] == 0
    assert asked["modules loaded"] == 0
    assert asked["GEMMs"] == 10 * 5  # two forward, three backward: x needs no gradient
    assert asked["Triton launches"] >= 20
    before = torch.fakegpu_counts()
    assert step(x).item() == 0
    assert since(before)["copies to the host"] == since(before)["stream syncs"] == 1


def test_memory_ends_where_the_device_s_does():
    big = torch.empty(60 << 30, dtype=torch.uint8, device="cuda")
    assert torch.cuda.max_memory_allocated() >= big.numel()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(30 << 30, dtype=torch.uint8, device="cuda")


def test_a_graph_is_one_launch_and_may_not_wait():
    x, w = torch.zeros(64, 64, device="cuda"), torch.ones(64, 64, device="cuda")
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        (x @ w).relu()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x @ w).relu()
    before = torch.fakegpu_counts()
    graph.replay()
    asked = since(before)
    assert asked["graph launches"] == 1
    assert asked["kernels in graphs"] == 2
    assert asked["ATen launches"] == asked["GEMMs"] == 0
    with (
        pytest.raises(torch.AcceleratorError, match="capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        y.sum().item()


def test_attention_is_cudnn_s_and_lies_as_on_a_gpu():
    """(B, T, H, D) in memory, as the inputs do; on a CPU the result lies as (B, H, T, D)."""
    shape = (2, 128, 4, 64)
    q, k, v = (torch.zeros(shape, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    before = torch.fakegpu_launches().get("cudnn_graph", 0)
    rows = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True)
    assert out.transpose(1, 2).is_contiguous()
    out.sum().backward()
    assert torch.fakegpu_launches()["cudnn_graph"] == before + 2
    assert q.grad.shape == shape


def test_pinned_memory_is_told_from_other():
    assert torch.ones(3).pin_memory().is_pinned()
    assert not torch.ones(3).is_pinned()
    before = torch.fakegpu_counts()
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert since(before)["copies of unpinned memory"] == 0
    torch.ones(3).to("cuda")
    assert since(before)["copies of unpinned memory"] == 1


@triton.jit
def copy_kernel(x, y, n, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


def test_triton_s_launches_have_names_and_take_no_cpu_tensors():
    x, y = torch.ones(100, device="cuda"), torch.empty(100, device="cuda")
    copy_kernel[(1,)](x, y, 100, B=128)
    copy_kernel[(1,)](x, y, 100, B=128)
    assert torch.fakegpu_launches()["copy_kernel"] == 2
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        copy_kernel[(1,)](torch.ones(100), y, 100, B=128)

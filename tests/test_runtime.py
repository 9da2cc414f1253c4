"""What a run runs on: devices named or refused, true peaks, and what compiling must be told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastlm import runtime
from fastlm.config import PRESETS
from fastlm.errors import UserError
from fastlm.model import Transformer
from fastlm.runtime import compiled, matmul_dtype, matmul_rate, peak_gib, peak_of, pick_device

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def gpus(monkeypatch, count: int) -> None:
    """As if so many GPUs were there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_unusable_devices_are_named(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "mps"):
        with pytest.raises(
            UserError, match=f"device is {name!r}; choose among auto, cpu, cuda, cuda:N"
        ):
            pick_device(name)
    gpus(monkeypatch, 0)
    assert pick_device("auto").type == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=f"device is {name}, but PyTorch sees no GPU here"):
            pick_device(name)


def test_a_gpu_named_by_its_number_is_the_one_that_kernels_are_launched_on(monkeypatch):
    gpus(monkeypatch, 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert current == []
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert current == [1]
    with pytest.raises(UserError, match="device is cuda:2, but the last GPU here is cuda:1"):
        pick_device("cuda:2")
    monkeypatch.setattr(runtime, "launched", lambda: True)
    with pytest.raises(
        UserError, match="under torchrun each process takes a GPU of its own; pass --device cuda"
    ):
        pick_device("cuda:1")


def test_matmuls_run_in_bf16_only_where_a_gpu_has_it_itself(monkeypatch):
    assert matmul_dtype(CPU) == torch.float32
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it
        )
        assert matmul_dtype(GPU) == expected


def test_autocast_leaves_a_cpu_in_fp32():
    x = torch.randn(4, 4)
    with runtime.autocast(CPU):
        assert (x @ x).dtype == torch.float32


def test_tf32_is_on_only_where_it_is_wanted_and_only_inside(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    flags = torch.backends.cuda.matmul
    with runtime.tf32_matmuls(False, GPU):
        assert not flags.allow_tf32
    with runtime.tf32_matmuls(True, GPU):
        assert flags.allow_tf32
    assert not flags.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: False)
    with (
        pytest.raises(UserError, match="--tf32 needs an NVIDIA GPU"),
        runtime.tf32_matmuls(True, GPU),
    ):
        pass


def test_compiling_without_a_compiler_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and none was found"):
        compiled(torch.sin, CPU)


def test_a_small_model_is_replayed_and_only_on_a_gpu():
    with torch.device("meta"):
        small, large = Transformer(PRESETS["demo"]), Transformer(PRESETS["modern-124m"])
    assert runtime.replays_graphs(small, GPU)
    assert not runtime.replays_graphs(large, GPU)
    assert not runtime.replays_graphs(small, CPU)


class InGraphMemory(torch.autograd.Function):
    """sum(w x), whose gradient lies, as a CUDA graph's does, where the one of the pass before it
    lay.
    """

    memory = torch.empty(3)

    @staticmethod
    def forward(ctx, w, x):
        ctx.save_for_backward(x)
        return (w * x).sum()

    @staticmethod
    def backward(ctx, dloss):
        InGraphMemory.memory.copy_(ctx.saved_tensors[0] * dloss)
        return InGraphMemory.memory.detach(), None


def test_gradients_add_up_although_a_replayed_graph_overwrites_its_own(monkeypatch):
    monkeypatch.setattr(runtime, "compiled", lambda function, device, options: function)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.ones(3))
    step = runtime.compiled_in_graphs(lambda x: InGraphMemory.apply(model.w, x), GPU, model)
    for parts in (1, 2, 4, 1, 3):
        rows = torch.arange(3.0 * parts).view(parts, 3)
        for row in rows:
            step(row).backward()
        assert torch.equal(model.w.grad, rows.sum(0))
        in_place = model.w.grad.data_ptr() == InGraphMemory.memory.data_ptr()
        assert in_place == (parts == 1)  # a copy only where it is needed
        model.w.grad = None


def test_a_replayed_pass_finds_its_batch_where_the_first_one_was(monkeypatch):
    """The backward graph reads it there: another place would be another recording, every time."""
    seen = []

    def function(x, packed):
        seen.append([(t.data_ptr(), t.tolist()) for t in (x, *packed["documents"])])
        return x.sum()

    monkeypatch.setattr(runtime, "compiled", lambda function, device, options: function)
    step = runtime.compiled_in_graphs(function, GPU, torch.nn.Module())
    batches = [
        (
            torch.full((2, 3), n),
            {"documents": (torch.arange(n, n + 4), torch.tensor(n)), "plain": 7},
        )
        for n in range(3)
    ]
    for batch in batches:
        step(*batch)
    step(torch.zeros(5, 3), batches[0][1])
    for n, tensors in enumerate(seen[:3]):
        assert [address for address, _ in tensors] == [address for address, _ in seen[0]]
        assert [values for _, values in tensors] == [[[n] * 3] * 2, list(range(n, n + 4)), n]
    assert seen[3][0][0] != seen[0][0][0]  # another shape
    assert seen[3][1:] == seen[0][1:]


def test_a_gpu_is_deterministic_only_where_it_is_wanted(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    runtime.set_deterministic(True, CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        runtime.set_deterministic(True, GPU)
        assert torch.are_deterministic_algorithms_enabled()
        assert (
            os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        )  # one of the two that PyTorch accepts
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        runtime.set_deterministic(False, GPU)
    assert not torch.are_deterministic_algorithms_enabled()


def test_inductor_learns_of_every_op_of_ours_and_keeps_its_inputs_strides():
    """In a process of its own: what Inductor has been told stays told."""
    code = """
import torch, fastlm.model
from fastlm.runtime import declare_own_ops_to_inductor
declare_own_ops_to_inductor()
declare_own_ops_to_inductor()  # once more changes nothing
from torch._inductor.lowering import constrain_to_fake_tensors, lowerings, maybe_layout_constraints
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastlm::")]
assert len(names) > 12
for name in names:
    op = getattr(torch.ops.fastlm, name.removeprefix("fastlm::").partition(".")[0]).default
    assert op in lowerings, name
    assert maybe_layout_constraints(op) is constrain_to_fake_tensors, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("AMD Instinct MI250X / MI250", 191.5),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA L40", None),  # not an L4
        ("NVIDIA A100X", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_held_to_the_peak_of_its_own_name(name, tera):
    assert peak_of(name) == (None if tera is None else tera * 1e12)


def test_the_peak_is_this_process_s_own_and_not_its_parent_s():
    block = torch.ones(160 << 20)  # 640 MB, which the child below never holds
    code = "from fastlm.runtime import process_peak_gib; print(process_peak_gib())"
    child = float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert child < block.nbytes / 2**30
    assert peak_gib(CPU) > block.nbytes / 2**30


def test_matmul_rate_is_a_rate_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    assert 1e8 < matmul_rate(CPU, torch.float32, 0.05) < 1e15
    assert torch.equal(torch.get_rng_state(), before)

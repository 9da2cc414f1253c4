"""The kernels' PTX executed on the CPU (tests/gpuless/ptxsim), which checks bounds, alignment,
barriers and races.

Run by test_compiled.py, in a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS / "gpuless"), str(TESTS / "kernels")]

import plain_ops as plain_op  # noqa: E402
from exactness import assert_as_exact, leaves, run, unaligned  # noqa: E402

from fastlm import kernels  # noqa: E402
from fastlm.kernels import updates  # noqa: E402
from fastlm.kernels.audit.configurations import cases  # noqa: E402
from fastlm.kernels.common import triton_on_cpu  # noqa: E402
from fastlm.kernels.triton import updates as on_gpu  # noqa: E402
from ptxsim import launches  # noqa: E402
from ptxsim.memory import GlobalMemory  # noqa: E402

TARGETS = [80, 90, 100]
BF16, FP32 = torch.bfloat16, torch.float32


def simulated(op, plain, inputs, upstream, target, scale=1.0):
    """op's outputs and gradients from its PTX against float64, by the tolerance rule.

    No kernel may use an atomic.
    """
    with triton_on_cpu(), launches(target=target) as record:
        actual = run(
            op, [x.detach().requires_grad_(x.is_floating_point()) for x in inputs], upstream
        )
    assert record
    assert not any(stats.instructions["atomic"] for _, stats in record)
    same = run(plain, leaves(*inputs), upstream)
    truth = run(plain, leaves(*[x.double() for x in inputs]), [g.double() for g in upstream])
    for i, (a, t, s) in enumerate(zip(actual, truth, same, strict=True)):
        assert_as_exact(a.detach(), t.detach(), s.detach(), f"result {i}", scale)


def grid(*shape, dtype):
    """Numbers on a coarse grid, whose sums are exact."""
    return ((torch.randn(*shape) * 4).round() / 4).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("width", "rows", "dtype"),
    [
        (7, 3, BF16),
        (256, 19, BF16),
        (512, 5, FP32),
        (1000, 3, BF16),
        (1024, 5, BF16),
        (8192, 2, BF16),
    ],
)
def test_add_rms_norm(width, rows, dtype, target):
    x, r, g, h = (grid(rows, width, dtype=dtype) for _ in range(4))
    inputs = [x, r, torch.randn(width)]
    simulated(
        lambda *a: kernels.add_rms_norm(*a, 1e-5),
        plain_op.add_rms_norm,
        inputs,
        [g, h],
        target,
        scale=2,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("width", "dtype"), [(7, BF16), (1000, BF16), (4096, BF16), (127, FP32)])
def test_swiglu(width, dtype, target):
    simulated(
        kernels.swiglu,
        plain_op.swiglu,
        [3 * torch.randn(3, 2 * width).to(dtype)],
        [torch.randn(3, width).to(dtype)],
        target,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "dtype"),
    [(16, 16, 64, BF16), (9, 3, 64, BF16), (3, 1, 6, FP32), (2, 2, 96, BF16)],
)
def test_rope_of_a_packed_projection(heads, kv_heads, width, dtype, target):
    cos, sin = plain_op.rotary_table(width, "cpu")
    positions = torch.tensor([[3, 0, 39], [1, 1, 7]])

    def views(z):
        return z.view(2, 3, -1, width).split([heads, kv_heads, kv_heads], 2)[:2]

    def plain(z):
        return tuple(plain_op.rotate(x, cos[positions], sin[positions]) for x in views(z))

    packed = torch.randn(2, 3, (heads + 2 * kv_heads) * width).to(dtype)
    up = [torch.randn(x.shape).to(dtype) for x in views(packed)]
    simulated(lambda z: kernels.rope(*views(z), cos, sin, positions), plain, [packed], up, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("width", "dtype"), [(37, BF16), (1000, FP32), (50257, BF16)])
def test_cross_entropy(width, dtype, target):
    targets = torch.tensor([width - 1, -100, 0])
    options = (
        {"reduction": "none", "z_loss": 1e-3, "label_smoothing": 0.1}
        if width == 1000
        else {"reduction": "none"}
    )
    simulated(
        lambda z: kernels.cross_entropy(z, targets, **options),
        lambda z: plain_op.cross_entropy(z, targets, **options),
        [3 * torch.randn(3, width).to(dtype)],
        [torch.randn(3)],
        target,
        scale=2,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("width", "reduction"), [(50, "sum"), (8219, "sum"), (8219, "none")])
def test_linear_cross_entropy_in_place(width, reduction, target):
    """Both passes over one buffer.

    No warp overwrites what another has yet to read (row 0's target is its first column).
    """
    h, w, targets = (
        torch.randn(5, 16),
        torch.randn(width, 16) / 4,
        torch.tensor([0, width - 1, -1, 7, 20]),
    )
    up = [torch.randn(5)] if reduction == "none" else [torch.tensor(1.0)]
    options = {"reduction": reduction, "ignore_index": -1, "softcap": 5.0, "vocab_size": width - 3}
    targets = targets.clamp(max=width - 4)
    simulated(
        lambda h, w: kernels.linear_cross_entropy(h, w, targets, **options),
        lambda h, w: plain_op.cross_entropy(h @ w.T, targets, **options),
        [h, w],
        up,
        target,
        scale=2,
    )


def test_unaligned_pointers_and_strides():
    x, w, g = (
        unaligned(torch.randn(3, 1024).bfloat16()),
        unaligned(torch.randn(1024)),
        torch.randn(3, 2000).bfloat16()[:, 5:1029],
    )
    simulated(lambda x, w: kernels.rms_norm(x, w, 1e-5), plain_op.rms_norm_in_fp32, [x, w], [g], 90)
    simulated(kernels.swiglu, plain_op.swiglu, [x], [g[:, :512]], 90)
    z, targets = unaligned(torch.randn(3, 5000).bfloat16()), torch.tensor([4999, 0, 17])
    up = [torch.tensor(1.0)]
    simulated(
        lambda z: kernels.cross_entropy(z, targets),
        lambda z: plain_op.cross_entropy(z, targets),
        [z],
        up,
        90,
    )


@pytest.mark.parametrize("target", [80, 90])
def test_targets_out_of_range_are_never_an_access_out_of_bounds(target):
    z, targets = (
        torch.randn(5, 5000).bfloat16().requires_grad_(),
        torch.tensor([5000, -1, 1 << 40, -(1 << 40), 3]),
    )
    with triton_on_cpu(), launches(target=target):
        loss = kernels.cross_entropy(z, targets, reduction="none")
        loss.sum().backward()
    assert loss.isnan().tolist() == [True] * 4 + [False]
    assert z.grad[:4].isnan().all()


@pytest.mark.parametrize("case", cases(BF16), ids=lambda c: c.name)
def test_sectors_conflicts_and_instruction_bounds(case):
    """On the streamed operands at most 1.05 sector bytes a byte, 128 bytes a request or more.

    Issue and special-function bounds on an H100 at most 0.6 of the memory bound, launches of one
    case together. Projections from counts.
    """
    rows = 5 if case.width > 50000 else 72

    def make(*shape, dtype):
        return (
            torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(1000, shape)
        )

    with launches(target=90) as record:
        case.launch(make, rows)
    bounds = [stats.projected_us() for _, stats in record]
    memory = sum(b["memory"] for b in bounds)
    assert sum(b["issue"] for b in bounds) <= 0.6 * memory
    assert sum(b["mufu"] for b in bounds) <= 0.6 * memory
    streamed = [t for _, stats in record for name, t in stats.tensors.items() if name in case.bulk]
    asked = sum(t.load_bytes + t.store_bytes for t in streamed)
    assert 32 * sum(t.load_sectors + t.store_sectors for t in streamed) <= 1.05 * asked
    conflicts = sum(stats.bank_conflicts for _, stats in record)
    assert conflicts <= 0.002 * sum(
        stats.instructions.total() for _, stats in record
    )  # a norm's exchange of row sums


@contextlib.contextmanager
def simulated_updates(target):
    """Launches of kernels/updates.py run in the simulator.

    Tables hold the simulated addresses of the lists' tensors.
    """
    launch = on_gpu.launch
    listed: list[torch.Tensor] = []

    class Memory(GlobalMemory):
        def __init__(self):
            super().__init__()
            self.listed = {t.data_ptr(): self.add(f"list {i}", t) for i, t in enumerate(listed)}

    def launch_with(kernel, lists, **arguments):
        listed[:] = [t for tensors in lists.values() for t in tensors]
        launch(kernel, lists, **arguments)

    def on_device(values, dtype, device):
        found = Memory().listed if dtype == torch.int64 else {}
        return torch.tensor([found.get(value, value) for value in values], dtype=dtype)

    with (
        mock.patch("ptxsim.simulate.GlobalMemory", Memory),
        mock.patch.multiple(on_gpu, launch=launch_with, on_device=on_device),
        triton_on_cpu(),
        launches(target=target) as record,
    ):
        yield record


def in_one_storage(shapes, dtype=torch.float32):
    """The simulator wants all accesses of an instruction in one tensor's storage, and programs run
    side by side.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.randn(sum(sizes)).abs().to(dtype)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_the_optimizers_passes(target, aligned):
    """Norm and factor, Muon's momentum, direction and step, AdamW's step: against float64."""
    shapes = [(96, 64), (1, 48)] if aligned else [(33, 129), (1, 5)]
    p, g, m, v, q = (in_one_storage(shapes) for _ in range(5))
    start = [[t.double() for t in tensors] for tensors in (p, g, m, v, q)]
    directions = in_one_storage(shapes, torch.float16)
    steps = list(torch.full((len(shapes),), 4.0).unbind())
    with simulated_updates(target) as record:
        norm, factor, found_inf = updates.global_norm(g, 1.0)
        updates.momentum_step(g, m, directions, 0.9, factor, found_inf)
        updates.muon_step(p, directions, [3.0, 2.0], 0.02, 0.1, found_inf)
        updates.adamw_step(
            updates.AdamWTensors(q, g, m, v, steps),
            [updates.Rate(0.1, 0.1)] * 2,
            1.0,
            (0.9, 0.99),
            factor,
        )
    assert {name for name, _ in record} == {*on_gpu.PASSES, "clip_kernel"}
    assert not any(stats.instructions["atomic"] for _, stats in record)
    truth = torch.cat([t.flatten() for t in start[1]]).norm()
    assert norm.item() == pytest.approx(truth.item(), rel=1e-6)
    for i, (p0, g0, m0, v0, q0) in enumerate(zip(*start, strict=True)):
        clipped = g0 / (truth + 1e-6)
        m1 = 0.9 * m0 + 0.1 * clipped
        u = 0.1 * clipped + 0.9 * m1
        torch.testing.assert_close(directions[i].double(), u / u.norm(), rtol=8e-3, atol=1e-6)
        moved = (1 - 0.02 * 0.1) * p0 - 0.02 * (3.0, 2.0)[i] * directions[i].double()
        torch.testing.assert_close(p[i].double(), moved, rtol=1e-5, atol=1e-6)
        m2, v2 = 0.9 * m1 + 0.1 * clipped, 0.99 * v0 + 0.01 * clipped**2
        stepped = (1 - 0.1 * 0.1) * q0 - 0.1 * (m2 / (1 - 0.9**5)) / (
            (v2 / (1 - 0.99**5)).sqrt() + 1e-8
        )
        torch.testing.assert_close(q[i].double(), stepped, rtol=1e-5, atol=1e-5)

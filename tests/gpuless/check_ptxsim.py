"""The PTX simulator against PyTorch in float64 and Python's integers, and what it must refuse.

Run by test_instruments.py, in a process of its own: kernels are compiled here, not interpreted.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ptxsim import SimulationError, launches, run_ptx, simulate

TARGETS = [80, 90, 100, 120]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


@triton.jit
def softmax_kernel(x, y, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BD)
    inside = column < D
    value = tl.load(x + row * D + column, mask=inside, other=-float("inf")).to(tl.float32)
    power = tl.exp(value - tl.max(value, 0))
    result = power / tl.sum(power, 0)
    tl.store(y + row * D + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def log_sum_exp_kernel(x, y, D, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, total = -float("inf"), 0.0
    for first in range(0, D, BD):
        column = first + tl.arange(0, BD)
        value = tl.load(x + row * D + column, mask=column < D, other=-float("inf"))
        value = value.to(tl.float32)
        higher = tl.maximum(top, tl.max(value, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher), 0)
        top = higher
    tl.store(y + row, top + tl.log(total))


@triton.jit
def transpose_kernel(x, y, R, C, B: tl.constexpr):
    row = tl.program_id(0) * B + tl.arange(0, B)
    column = tl.program_id(1) * B + tl.arange(0, B)
    read = (row[:, None] < R) & (column[None, :] < C)
    value = tl.load(x + row[:, None] * C + column[None, :], mask=read)
    write = (column[:, None] < C) & (row[None, :] < R)
    tl.store(y + column[:, None] * R + row[None, :], tl.trans(value), mask=write)


@triton.jit
def branch_kernel(x, y, t, n, B: tl.constexpr):
    block = tl.program_id(0)
    at = block * B + tl.arange(0, B)
    factor = tl.load(t + block)
    if factor < 0:
        tl.store(y + at, tl.zeros((B,), tl.float32), mask=at < n)
        return
    tl.store(y + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)


@triton.jit
def atomic_kernel(x, y, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(y, tl.sum(tl.load(x + at, mask=at < n, other=0.0), 0))


@triton.jit
def copy_without_mask_kernel(x, y, D, B: tl.constexpr):
    at = tl.program_id(0) * D + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def swap_in_place_kernel(x, D, B: tl.constexpr, SYNC: tl.constexpr):
    row = x + tl.program_id(0) * D
    column = tl.arange(0, B)
    value = tl.load(row + column)
    if SYNC:
        tl.debug_barrier()
    tl.store(row + (column ^ (B // 2)), value)


@triton.jit
def overlapping_rows_kernel(x, D, B: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, B)
    tl.store(x + row * (D - 1) + column, row + 0.0 * column)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("width", "warps"), [(1, 1), (33, 4), (128, 8), (777, 4), (1024, 1)])
def test_softmax_matches_float64(target, dtype, width, warps):
    x = torch.randn(5, width).to(dtype)
    y = torch.full_like(x, float("nan"))
    size = triton.next_power_of_2(width)
    simulate(softmax_kernel, 5, x, y, width, BD=size, target=target, num_warps=warps)
    assert relative_error(y, x.double().softmax(-1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [1000, 50257])
def test_looped_reduction_matches_float64(target, width):
    x, y = torch.randn(3, width).bfloat16() * 4, torch.empty(3)
    simulate(log_sum_exp_kernel, 3, x, y, width, BD=4096, target=target, num_warps=8)
    assert relative_error(y, x.double().logsumexp(-1)) < 1e-6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transpose_through_shared_memory_is_exact(target, dtype):
    x = torch.randn(70, 45).to(dtype)
    y = torch.zeros(45, 70).to(dtype)
    simulate(transpose_kernel, (3, 2), x, y, 70, 45, B=32, target=target)
    assert torch.equal(y, x.T)


@pytest.mark.parametrize("target", TARGETS)
def test_blocks_branch_independently(target):
    x, y = torch.randn(1000), torch.full((1000,), float("nan"))
    factors = torch.tensor([2, -1, 3, -5])
    simulate(branch_kernel, 4, x, y, factors, 1000, B=256, target=target)
    assert torch.equal(y, x * factors.clamp(min=0).repeat_interleave(256)[:1000])


def test_atomics_are_counted():
    x, y = torch.ones(1000), torch.zeros(1)
    stats = simulate(atomic_kernel, 4, x, y, 1000, B=256)
    assert y.item() == 1000
    assert stats.instructions["atomic"] == 4


def test_traffic_of_a_copy_is_one_pass():
    x = torch.randn(64, 1024).bfloat16()
    y = torch.empty_like(x)
    stats = simulate(copy_without_mask_kernel, 64, x, y, 1024, B=1024)
    assert torch.equal(x, y)
    assert stats.dram_bytes() == 32 * stats.sectors() == 2 * x.nbytes
    assert stats.tensors["x"].load_bytes / stats.tensors["x"].load_requests == 512


def test_out_of_bounds_is_caught():
    x = torch.randn(4, 777).bfloat16()
    with pytest.raises(SimulationError, match="out of bounds"):
        simulate(copy_without_mask_kernel, 4, x, torch.empty_like(x), 777, B=1024)


def test_misalignment_is_caught_and_unaligned_pointers_work():
    store = torch.randn(4 * 1024 + 1).bfloat16()
    x, y = store[1:].view(4, 1024), torch.empty(4, 1024).bfloat16()
    simulate(copy_without_mask_kernel, 4, x, y, 1024, B=1024)
    assert torch.equal(x, y)
    with pytest.raises(SimulationError, match="misaligned"):
        simulate(copy_without_mask_kernel, 4, x, y, 1024, B=1024, assume_aligned=("x",))


def test_race_between_warps_is_caught_and_a_barrier_mends_it():
    x = torch.randn(4, 128)  # one element a thread, so that the compiler needs no barrier itself
    with pytest.raises(SimulationError, match="race"):
        simulate(swap_in_place_kernel, 4, x.clone(), 128, B=128, SYNC=False, num_warps=4)
    y = x.clone()
    simulate(swap_in_place_kernel, 4, y, 128, B=128, SYNC=True, num_warps=4)
    assert torch.equal(y, x.roll(64, -1))


def test_one_warp_does_not_race_with_itself():
    x = torch.randn(4, 128)
    y = x.clone()
    simulate(swap_in_place_kernel, 4, y, 128, B=128, SYNC=False, num_warps=1)
    assert torch.equal(y, x.roll(x.shape[1] // 2, -1))


def test_race_between_blocks_is_caught():
    with pytest.raises(SimulationError, match="race"):
        simulate(overlapping_rows_kernel, 4, torch.zeros(4 * 128), 128, B=128)


def test_ordinary_launches_run_here():
    x, y = torch.randn(5, 777).bfloat16(), torch.empty(5, 777).bfloat16()
    with launches(target=80) as record:
        softmax_kernel[(5,)](x, y, 777, BD=1024, num_warps=8)
        softmax_kernel[lambda meta: (triton.cdiv(5, 1),)](x, y, 777, 1024)
    assert relative_error(y, x.double().softmax(-1)) < TOLERANCE[torch.bfloat16]
    assert [name for name, _ in record] == ["softmax_kernel", "softmax_kernel"]


def run_instructions(code: str, *sources: int, size: int = 4) -> int:
    """Run PTX on the sources in %a0, %a1, ...; the result is what it leaves in %out, unsigned."""
    dtype, suffix = (torch.int64, "b64") if size == 8 else (torch.int32, "b32")
    given = torch.tensor([wrapped(source, 8 * size) for source in sources], dtype=dtype)
    result = torch.zeros(1, dtype=dtype)
    loads = [
        f"ld.global.{suffix} %a{i}, [%rd1+{size * i}];" for i in range(len(sources))
    ]  # fmt: skip
    body = "\n".join([*loads, code, f"st.global.{suffix} [%rd2], %out;", "ret;"])
    ptx = f"""
    .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
    {{
        ld.param.u64 %rd1, [kernel_param_0];
        ld.param.u64 %rd2, [kernel_param_1];
        {body}
    }}
    """
    run_ptx(ptx, 1, [("given", given, "*i32"), ("result", result, "*i32")], 32, 0)
    return int(result[0]) & (1 << 8 * size) - 1


def wrapped(value: int, bits: int) -> int:
    """The signed number with these bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


BIG = 0xFEDCBA9876543210


@pytest.mark.parametrize(
    ("code", "sources", "expected"),
    [
        ("mul.hi.u32 %out, %a0, %a1;", (0xFFFFFFFF, 0xFFFFFFFE), 0xFFFFFFFD),
        ("mul.hi.s32 %out, %a0, %a1;", (-3, 5), 0xFFFFFFFF),
        ("mad.hi.u32 %out, %a0, %a1, %a2;", (0x80000000, 6, 10), 13),
        ("bfe.s32 %out, %a0, 4, 4;", (0x0F0,), 0xFFFFFFFF),
        ("bfe.u32 %out, %a0, 4, 8;", (0xABCD,), 0xBC),
        ("prmt.b32 %out, %a0, %a1, 0x7510;", (0x33221100, 0x77665544), 0x77551100),
        ("brev.b32 %out, %a0;", (0b1011,), 0xD0000000),
        ("clz.b32 %out, %a0;", (0x00010000,), 15),
        ("popc.b32 %out, %a0;", (0xF0F0,), 8),
        ("shr.s32 %out, %a0, 40;", (-8,), 0xFFFFFFFF),
        ("shl.b32 %out, %a0, 32;", (1,), 0),
        ("div.s32 %out, %a0, %a1;", (-7, 2), wrapped(-3, 32) & 0xFFFFFFFF),
        ("rem.s32 %out, %a0, %a1;", (-7, 2), 0xFFFFFFFF),
        ("lop3.b32 %out, %a0, %a1, %a2, 0x96;", (0b1100, 0b1010, 0b1001), 0b1111),
    ],
)
def test_integer_instructions_match_arithmetic(code, sources, expected):
    assert run_instructions(code, *sources) == expected


def test_the_high_half_of_a_64_bit_product():
    found = run_instructions("mul.hi.u64 %out, %a0, %a1;", BIG, BIG - 1, size=8)
    assert found == BIG * (BIG - 1) >> 64


def test_what_was_never_written_reads_as_nan_and_not_as_a_convenient_zero():
    found = run_instructions("mov.b64 %w, {%a0, %never};\nmov.b64 {%low, %out}, %w;", 7)
    assert found == 0xFFFFFFFF
    assert torch.tensor(found, dtype=torch.uint32).view(torch.float32).isnan()


def test_an_unknown_opcode_is_an_error():
    with pytest.raises(SimulationError, match="unknown opcode"):
        run_instructions("frobnicate.b32 %out, %a0, %a0;", 1)

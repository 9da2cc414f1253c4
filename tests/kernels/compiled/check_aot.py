"""Every shipped configuration built for every architecture, without a GPU.

Run by test_compiled.py, in a process of its own.
"""

from __future__ import annotations

import re

import pytest
import torch
import triton

from fastlm.kernels import updates
from fastlm.kernels.audit import inspect
from fastlm.kernels.audit.configurations import cases
from fastlm.kernels.common import triton_on_cpu
from fastlm.kernels.triton import updates as on_gpu

BF16 = cases(torch.bfloat16, every_width=True)
MODEL = cases(torch.bfloat16)
FP32 = cases(torch.float32)


def without_storage(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(case, rows=32768):
    return inspect.record(lambda: case.launch(without_storage, rows))


def check(case, target, bulk_bits=128):
    for launch in launches(case):
        built = inspect.read_binary(launch, target)
        # Triton 3.6's assembler keeps 8 bytes of the in-place cross-entropy on sm_120's stack; that
        # of 3.9 none.
        assert built.spills <= (
            8 if target == "sm_120" and triton.__version__.startswith("3.6.") else 0
        ), built
        assert built.fp64 == 0, built
        assert built.atomics == 0, built
        narrowest = (
            bulk_bits // 2 if target.startswith("gfx") else bulk_bits
        )  # 64 lanes to a warp: as many bytes
        assert narrowest <= built.load_bits <= bulk_bits, built
        assert built.registers <= 255, built
        if built.kernel != "sum_partials_kernel" and "forward" not in case.direction:
            assert narrowest <= built.store_bits <= bulk_bits, built


@pytest.mark.parametrize("target", inspect.TARGETS)
@pytest.mark.parametrize("case", MODEL, ids=lambda c: c.name)
def test_the_model_s_kernels_build_for_every_architecture(case, target):
    """No spills, no fp64, no atomics, 128-bit accesses.

    Also at V = 50257, whose rows start unaligned.
    """
    check(case, target)


@pytest.mark.parametrize("target", inspect.DEVICES)
@pytest.mark.parametrize(
    "case", [c for c in BF16 if c.direction == "in place"], ids=lambda c: c.name
)
def test_logits_in_flight_fit_in_the_l2_cache(case, target):
    """So that the second read of a row, which makes the gradient, need not come from memory."""
    (launch,) = launches(case)
    rows = inspect.programs_in_flight(inspect.read_binary(launch, target), launch.num_warps, target)
    row_bytes = launch.arguments["STRIDE"] * case.dtype.itemsize
    assert rows * row_bytes <= inspect.DEVICES[target][1]


@pytest.mark.parametrize(
    "case", [c for c in BF16 if c.name not in {m.name for m in MODEL}], ids=lambda c: c.name
)
def test_every_width_s_block_size_builds(case):
    check(case, "sm_90")


@pytest.mark.parametrize("case", FP32, ids=lambda c: c.name)
def test_fp32_builds(case):
    check(case, "sm_80")


@pytest.mark.parametrize(
    "case", [c for c in MODEL if c.direction != "in place"], ids=lambda c: c.name
)
def test_rows_are_addressed_in_64_bits(case):
    """Nothing 32 bits wide is multiplied by a row's stride.

    More than 2^31 elements are addressed rightly.
    """
    for launch in launches(case):
        if launch.kernel.__name__ == "sum_partials_kernel":
            continue  # at most 396 x 32768 numbers
        ptx = inspect.compiled(launch, "sm_90").asm["ptx"]
        strides = {
            v
            for k, v in launch.arguments.items()
            if isinstance(v, int) and ("STRIDE" in k or k in ("D", "F"))
        }
        narrow = re.findall(r"(?:mul|mad)\.lo\.[su]32\s[^;]*?\b(\d+)(?:,[^;]*)?;", ptx)
        assert not {int(n) for n in narrow} & {s for s in strides if s > 64}, case.name
        assert re.search(r"(?:mul|mad)\.(?:lo\.[su]64|wide)|shl\.b64", ptx), case.name


def updates_calls(size: int) -> list:
    """Every launch of kernels/updates.py, on lists of two tensors of the size."""

    def some(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [without_storage(size, dtype=dtype) for _ in range(2)]

    number = without_storage(dtype=torch.float32)
    tensors = updates.AdamWTensors(some(), some(), some(), some(), [number, number])
    rates = [updates.Rate(0.1, 0.1)] * 2
    calls = (
        lambda: updates.global_norm(some(), 1.0, number),
        lambda: updates.momentum_step(some(), some(), some(torch.float16), 0.95, number, number),
        lambda: updates.muon_step(some(), some(torch.float16), [0.1, 0.2], 0.1, 0.1, number),
        lambda: updates.adamw_step(tensors, rates, 1.0, (0.9, 0.95), number),
    )
    with triton_on_cpu():
        return [launch for call in calls for launch in inspect.record(call)]


@pytest.mark.parametrize("target", inspect.TARGETS)
def test_the_optimizers_kernels_build_for_every_architecture(target):
    """In 16-byte accesses, but of the few partial sums and what is stored of them."""
    launches = updates_calls(3 * on_gpu.BLOCK)
    assert {launch.kernel.__name__ for launch in launches} == {*on_gpu.PASSES, "clip_kernel"}
    for launch in launches:
        built = inspect.read_binary(launch, target)
        assert (built.spills, built.fp64, built.atomics) == (0, 0, 0), built
        if built.kernel != "clip_kernel":
            assert built.load_bits == 128, built
        if built.kernel not in ("clip_kernel", "squares_kernel"):
            assert built.store_bits == 128, built


def test_the_optimizers_kernels_build_for_sizes_that_are_not_aligned():
    for launch in updates_calls(3 * on_gpu.BLOCK - 1):
        built = inspect.read_binary(launch, "sm_90")
        assert (built.spills, built.fp64, built.atomics) == (0, 0, 0), built

"""The optimizers' passes on a GPU: a launch for a list of tensors, found by their addresses.

The tensors are contiguous and in fp32, but for Muon's updates, in fp16.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.common import cdiv

BLOCK = 4096  # elements of one program: with 8 warps each thread has four 16-byte loads under way
CHUNK = 1024  # partial sums that a program adds up at a time
# Bytes read and written for each element, by kernel; a test counts them.
PASSES = {
    "squares_kernel": 4,
    "momentum_kernel": 14,
    "normalise_kernel": 4,
    "muon_kernel": 10,
    "adamw_kernel": 28,
}

# In the kernels: a list of tensors is the table of their addresses, (tensors,) int64, as are sizes,
# their numbers of elements. tensor_of, block_of: (programs,) int32, each program's tensor and its
# block of it. factor, skip, scale: one number each, or None.


@triton.jit
def tensor_at(table: tl.tensor, t: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """The tensor number t of a list."""
    pointer = tl.load(table + t).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def place(
    sizes: tl.tensor,
    tensor_of: tl.tensor,
    block_of: tl.tensor,
    skip: tl.tensor,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's tensor, its elements of it, and which of them are to be touched."""
    pid = tl.program_id(0)
    t = tl.load(tensor_of + pid)
    size = tl.load(sizes + t)
    if skip is not None:
        size = tl.where(tl.load(skip) == 0.0, size, 0)
    size = tl.multiple_of(size, 16) if ALIGNED else size
    element = tl.load(block_of + pid).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return t, element, element < size


@triton.jit
def squares_kernel(
    grads: tl.tensor,
    sizes: tl.tensor,
    tensor_of: tl.tensor,
    block_of: tl.tensor,
    partials: tl.tensor,  # (programs,)
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    t, i, touched = place(sizes, tensor_of, block_of, None, BLOCK, ALIGNED)
    g = tl.load(tensor_at(grads, t, ALIGNED) + i, mask=touched, other=0.0)
    tl.store(partials + tl.program_id(0), tl.sum(g * g))


@triton.jit
def sum_of(partials: tl.tensor, count: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """The sum of the first count partial sums."""
    total = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        total += tl.load(partials + i, mask=i < count, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["count"])
def clip_kernel(
    partials: tl.tensor,  # (count,)
    found: tl.tensor,  # (3,): norm, factor, 1 where the norm is not finite and else 0
    scale: tl.tensor,
    count: tl.tensor,
    max_norm: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    norm = tl.sqrt(sum_of(partials, count, CHUNK))
    unit = 1.0
    if scale is not None:
        unit = 1.0 / tl.load(scale)
    norm = norm * unit
    factor = max_norm / (norm + 1e-6)
    factor = tl.where(factor > 1.0, 1.0, factor) * unit  # NaN stays NaN
    tl.store(found, norm)
    tl.store(found + 1, factor)
    tl.store(found + 2, tl.where(norm < float("inf"), 0.0, 1.0))


@triton.jit
def momentum_kernel(
    grads: tl.tensor,
    averages: tl.tensor,
    updates: tl.tensor,
    sizes: tl.tensor,
    tensor_of: tl.tensor,
    block_of: tl.tensor,
    partials: tl.tensor,  # (programs,)
    factor: tl.tensor,
    skip: tl.tensor,
    momentum: tl.tensor,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    t, i, touched = place(sizes, tensor_of, block_of, skip, BLOCK, ALIGNED)
    g = tl.load(tensor_at(grads, t, ALIGNED) + i, mask=touched, other=0.0)
    if factor is not None:
        g *= tl.load(factor)
    average = tensor_at(averages, t, ALIGNED) + i
    m = tl.load(average, mask=touched, other=0.0)
    m += (1.0 - momentum) * (g - m)
    tl.store(average, m, mask=touched)
    # bf16: fp16 has not the range before it is divided by its norm
    u = (g + momentum * (m - g)).to(tl.bfloat16)
    update = tensor_at(updates, t, ALIGNED).to(tl.pointer_type(tl.bfloat16))
    tl.store(update + i, u, mask=touched)
    u = u.to(tl.float32)
    tl.store(partials + tl.program_id(0), tl.sum(u * u))


@triton.jit
def normalise_kernel(
    updates: tl.tensor,
    sizes: tl.tensor,
    tensor_of: tl.tensor,
    block_of: tl.tensor,
    partials: tl.tensor,  # (programs,)
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    t, i, touched = place(sizes, tensor_of, block_of, None, BLOCK, ALIGNED)
    first = tl.program_id(0) - tl.load(block_of + tl.program_id(0))
    blocks = ((tl.load(sizes + t) + BLOCK - 1) // BLOCK).to(tl.int32)
    norm = tl.sqrt(sum_of(partials + first, blocks, CHUNK))
    scale = 1.0 / tl.where(norm > 1e-7, norm, 1e-7)
    at = tensor_at(updates, t, ALIGNED)
    u = tl.load(at.to(tl.pointer_type(tl.bfloat16)) + i, mask=touched, other=0.0).to(tl.float32)
    tl.store(at.to(tl.pointer_type(tl.float16)) + i, (u * scale).to(tl.float16), mask=touched)


@triton.jit
def muon_kernel(
    parameters: tl.tensor,
    updates: tl.tensor,
    sizes: tl.tensor,
    tensor_of: tl.tensor,
    block_of: tl.tensor,
    scales: tl.tensor,  # (tensors,)
    skip: tl.tensor,
    kept: tl.tensor,  # 1 - lr decay
    lr: tl.tensor,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    t, i, touched = place(sizes, tensor_of, block_of, skip, BLOCK, ALIGNED)
    param = tensor_at(parameters, t, ALIGNED) + i
    update = tensor_at(updates, t, ALIGNED).to(tl.pointer_type(tl.float16)) + i
    p = tl.load(param, mask=touched)
    u = tl.load(update, mask=touched).to(tl.float32)
    tl.store(param, kept * p - (lr * tl.load(scales + t)) * u, mask=touched)


@triton.jit
def one_minus_exp(y: tl.tensor) -> tl.tensor:
    """1 - exp(y) for y <= 0, to fp32's precision where exp(y) is close to 1."""
    series = 1.0 + y / 8
    for n in tl.static_range(7, 1, -1):
        series = 1.0 + y / n * series
    return tl.where(y > -0.5, -y * series, 1.0 - tl.exp(y))


@triton.jit
def adamw_kernel(
    parameters: tl.tensor,
    grads: tl.tensor,
    averages: tl.tensor,
    squares: tl.tensor,
    steps: tl.tensor,  # a table, of one number each
    sizes: tl.tensor,
    tensor_of: tl.tensor,
    block_of: tl.tensor,
    rates: tl.tensor,  # (tensors, 2), learning rate and decay
    factor: tl.tensor,
    skip: tl.tensor,
    share: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    log_beta1: tl.tensor,
    log_beta2: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    t, i, touched = place(sizes, tensor_of, block_of, skip, BLOCK, ALIGNED)
    step = tl.load(tensor_at(steps, t, False))
    lr = share * tl.load(rates + 2 * t)
    kept = 1.0 - lr * tl.load(rates + 2 * t + 1)
    g = tl.load(tensor_at(grads, t, ALIGNED) + i, mask=touched, other=0.0)
    if factor is not None:
        g *= tl.load(factor)
    average = tensor_at(averages, t, ALIGNED) + i
    m = tl.load(average, mask=touched, other=0.0)
    m += (1.0 - beta1) * (g - m)
    tl.store(average, m, mask=touched)
    square = tensor_at(squares, t, ALIGNED) + i
    v = tl.load(square, mask=touched, other=0.0)
    v = beta2 * v + (1.0 - beta2) * g * g
    tl.store(square, v, mask=touched)
    rate = lr / one_minus_exp(step * log_beta1)
    spread = tl.sqrt(v) / tl.sqrt(one_minus_exp(step * log_beta2)) + eps
    param = tensor_at(parameters, t, ALIGNED) + i
    p = tl.load(param, mask=touched)
    tl.store(param, kept * p - rate * m / spread, mask=touched)


@lru_cache(maxsize=16)
def places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The sizes on the device, and for each program its tensor and its block of it."""
    blocks = torch.tensor([cdiv(size, BLOCK) for size in sizes])
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    first = (blocks.cumsum(0) - blocks)[tensor_of.long()]
    block_of = (torch.arange(len(tensor_of)) - first).int()
    return torch.tensor(sizes).to(device), tensor_of.to(device), block_of.to(device)


@lru_cache(maxsize=64)
def on_device(
    values: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The values on the device, without waiting for it.

    Gradients mostly come back to where they were a step ago, hence the cache.
    """
    table = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def launch(kernel: Any, lists: dict[str, list[Tensor]], **arguments: Any) -> None:
    """One program for every BLOCK elements.

    The tensors of one place in all lists have as many elements, or one.
    """
    some = next(iter(lists.values()))
    device = some[0].device
    sizes = tuple(tensor.numel() for tensor in some)
    addresses = {}
    for name, tensors in lists.items():
        dtype = torch.float16 if name == "updates" else torch.float32
        assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in tensors), name
        addresses[name] = tuple(tensor.data_ptr() for tensor in tensors)
    numbers = itertools.chain(sizes, *addresses.values())
    aligned = all(number % 16 == 0 for number in numbers)
    tables = {name: on_device(table, torch.int64, device) for name, table in addresses.items()}
    table_of_sizes, tensor_of, block_of = places(sizes, device)
    kernel[(len(tensor_of),)](
        **tables,
        sizes=table_of_sizes,
        tensor_of=tensor_of,
        block_of=block_of,
        **arguments,
        BLOCK=BLOCK,
        ALIGNED=aligned,
        num_warps=8,
    )


def room_for_partials(tensors: list[Tensor]) -> Tensor:
    """Room for one sum of each program."""
    blocks = sum(cdiv(tensor.numel(), BLOCK) for tensor in tensors)
    return torch.empty(blocks, dtype=torch.float32, device=tensors[0].device)


def global_norm(grads: list[Tensor], max_norm: float, scale: Tensor | None) -> Tensor:
    """(norm, factor, 1 where the norm is not finite and else 0)."""
    partials = room_for_partials(grads)
    launch(squares_kernel, {"grads": grads}, partials=partials)
    found = partials.new_empty(3)
    clip_kernel[(1,)](
        partials=partials,
        found=found,
        scale=scale,
        count=len(partials),
        max_norm=max_norm,
        CHUNK=CHUNK,
        num_warps=8,
    )
    return found


def momentum_step(
    lists: dict[str, list[Tensor]],
    momentum: float,
    factor: Tensor | None,
    skip: Tensor | None,
    normalise: bool,
) -> None:
    """Muon's momentum of lists grads, averages; each matrix's direction into the list updates."""
    partials = room_for_partials(lists["grads"])
    given = {"partials": partials, "factor": factor, "skip": skip, "momentum": momentum}
    launch(momentum_kernel, lists, **given)
    if normalise:
        updates = {"updates": lists["updates"]}
        launch(normalise_kernel, updates, partials=partials, CHUNK=CHUNK)


def muon_step(
    parameters: list[Tensor],
    updates: list[Tensor],
    scales: list[float],
    lr: float,
    decay: float,
    skip: Tensor | None,
) -> None:
    """Weight decay, and each parameter's step along its update, times its scale."""
    lists = {"parameters": parameters, "updates": updates}
    table = on_device(tuple(scales), torch.float32, parameters[0].device)
    launch(muon_kernel, lists, scales=table, skip=skip, kept=1 - lr * decay, lr=lr)


def adamw_step(
    lists: dict[str, list[Tensor]],
    rates: tuple[float, ...],
    share: float,
    betas: tuple[float, float],
    eps: float,
    factor: Tensor | None,
    skip: Tensor | None,
) -> None:
    """AdamW's step. lists: AdamWTensors by name; rates: learning rate and decay of each tensor."""
    # of one tensor instead of a list the host would read the value
    counted = 1 if skip is None else [1 - skip] * len(lists["steps"])
    torch._foreach_add_(lists["steps"], counted)  # type: ignore[call-overload]
    log_beta1, log_beta2 = (math.log(beta) if beta else -math.inf for beta in betas)
    launch(
        adamw_kernel,
        lists,
        rates=on_device(rates, torch.float32, lists["parameters"][0].device),
        factor=factor,
        skip=skip,
        share=share,
        beta1=betas[0],
        beta2=betas[1],
        log_beta1=log_beta1,
        log_beta2=log_beta2,
        eps=eps,
    )

"""What an optimizer does to all its tensors at once: a pass over a list of them is one launch.

    global norm     norm = sqrt(sum over all g of |g|^2) / scale,   factor = min(1, max_norm / (norm + 1e-6)) / scale
    Muon, momentum  m <- m + (1 - mu) (factor g - m),   u = factor g + mu (m - factor g),   x = u / max(|u|_F, 1e-7)
    Muon, update    p <- (1 - lr decay) p - lr k x,   k = 0.2 sqrt(max(rows, columns)) of the matrix
    AdamW           p <- (1 - lr decay) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps),   m and v of factor g

PyTorch's own passes over lists take a launch for every 21 million elements and each reads and writes what the one
before left. Here the gradients are read once for their norm and once for the step: nothing is written back to them.
factor is a number on the device and so is skip (the step is left out where it is not 0): the host waits for neither.
Floors, bytes an element: PASSES. Sources: Pascanu et al. 2013 (clipping); Jordan et al. 2024, "Muon"; Liu et al. 2025,
"Muon is scalable for LLM training", eq. 4 (k); Loshchilov and Hutter 2019, algorithm 2 (AdamW).

The kernels are for CUDA tensors in fp32, contiguous. On a CPU the optimizers run PyTorch's functions.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fastlm.kernels.common import cdiv, jit, takes_triton, tl

BLOCK = 4096  # elements of one program: with 8 warps each thread has four 16-byte loads of a list under way
EPS = 1e-8  # of AdamW
CHUNK = 1024  # partial sums that a program adds up at a time
# Bytes read and written for each element, by kernel; a test counts them.
PASSES = {"_squares_kernel": 4, "_momentum_kernel": 14, "_normalise_kernel": 4, "_muon_kernel": 10, "_adamw_kernel": 28}


class AdamWTensors(NamedTuple):
    """The tensors of an AdamW step, parameter by parameter: steps are single numbers in fp32."""

    parameters: list[Tensor]
    grads: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]


class Rate(NamedTuple):
    """A parameter's learning rate and weight decay."""

    lr: float
    decay: float


# ---------------------------------------------------------------- Triton


@jit()
def _at(table, t, ALIGNED: tl.constexpr):
    """The tensor number t of a list, from the table of their addresses."""
    pointer = tl.load(table + t).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@jit()
def _place(sizes, tensor_of, block_of, skip, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's tensor, the elements of it that are this program's, and which of them are to be touched."""
    pid = tl.program_id(0)
    t = tl.load(tensor_of + pid)
    size = tl.load(sizes + t)
    if skip is not None:
        size = tl.where(tl.load(skip) == 0.0, size, 0)
    size = tl.multiple_of(size, 16) if ALIGNED else size
    element = tl.load(block_of + pid).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return t, element, element < size


@jit()
def _squares_kernel(grads, sizes, tensor_of, block_of, partials, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    t, i, touched = _place(sizes, tensor_of, block_of, None, BLOCK, ALIGNED)
    g = tl.load(_at(grads, t, ALIGNED) + i, mask=touched, other=0.0)
    tl.store(partials + tl.program_id(0), tl.sum(g * g))


@jit()
def _total(partials, count, CHUNK: tl.constexpr):
    total = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        total += tl.load(partials + i, mask=i < count, other=0.0)
    return tl.sum(total)


@jit(do_not_specialize=["count"])
def _clip_kernel(partials, found, scale, count, max_norm, CHUNK: tl.constexpr):
    norm = tl.sqrt(_total(partials, count, CHUNK))
    unit = 1.0
    if scale is not None:
        unit = 1.0 / tl.load(scale)
    norm = norm * unit
    factor = max_norm / (norm + 1e-6)
    factor = tl.where(factor > 1.0, 1.0, factor) * unit  # NaN stays NaN
    tl.store(found, norm)
    tl.store(found + 1, factor)
    tl.store(found + 2, tl.where(norm < float("inf"), 0.0, 1.0))


@jit()
def _momentum_kernel(
    grads, averages, updates, sizes, tensor_of, block_of, partials, factor, skip, momentum,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t, i, touched = _place(sizes, tensor_of, block_of, skip, BLOCK, ALIGNED)
    g = tl.load(_at(grads, t, ALIGNED) + i, mask=touched, other=0.0)
    if factor is not None:
        g *= tl.load(factor)
    average = _at(averages, t, ALIGNED) + i
    m = tl.load(average, mask=touched, other=0.0)
    m += (1.0 - momentum) * (g - m)
    tl.store(average, m, mask=touched)
    u = (g + momentum * (m - g)).to(tl.bfloat16)  # fp16 has not the range before it is divided by its norm
    update = _at(updates, t, ALIGNED).to(tl.pointer_type(tl.bfloat16))
    tl.store(update + i, u, mask=touched)
    u = u.to(tl.float32)
    tl.store(partials + tl.program_id(0), tl.sum(u * u))


@jit()
def _normalise_kernel(
    updates, sizes, tensor_of, block_of, partials,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t, i, touched = _place(sizes, tensor_of, block_of, None, BLOCK, ALIGNED)
    first = tl.program_id(0) - tl.load(block_of + tl.program_id(0))
    blocks = ((tl.load(sizes + t) + BLOCK - 1) // BLOCK).to(tl.int32)
    norm = tl.sqrt(_total(partials + first, blocks, CHUNK))
    scale = 1.0 / tl.where(norm > 1e-7, norm, 1e-7)
    at = _at(updates, t, ALIGNED)
    u = tl.load(at.to(tl.pointer_type(tl.bfloat16)) + i, mask=touched, other=0.0).to(tl.float32)
    tl.store(at.to(tl.pointer_type(tl.float16)) + i, (u * scale).to(tl.float16), mask=touched)


@jit()
def _muon_kernel(
    parameters, updates, sizes, tensor_of, block_of, scales, skip, kept, lr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
):
    t, i, touched = _place(sizes, tensor_of, block_of, skip, BLOCK, ALIGNED)
    param = _at(parameters, t, ALIGNED) + i
    update = _at(updates, t, ALIGNED).to(tl.pointer_type(tl.float16)) + i
    p = tl.load(param, mask=touched)
    u = tl.load(update, mask=touched).to(tl.float32)
    tl.store(param, kept * p - (lr * tl.load(scales + t)) * u, mask=touched)


@jit()
def _one_minus_exp(y):
    """1 - exp(y) for y <= 0, to fp32's precision where exp(y) is close to 1."""
    series = 1.0 + y / 8
    for n in tl.static_range(7, 1, -1):
        series = 1.0 + y / n * series
    return tl.where(y > -0.5, -y * series, 1.0 - tl.exp(y))


@jit()
def _adamw_kernel(
    parameters, grads, averages, squares, steps, sizes, tensor_of, block_of, rates, factor, skip,
    share, beta1, beta2, log_beta1, log_beta2, eps, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t, i, touched = _place(sizes, tensor_of, block_of, skip, BLOCK, ALIGNED)
    step = tl.load(_at(steps, t, False))
    lr = share * tl.load(rates + 2 * t)
    kept = 1.0 - lr * tl.load(rates + 2 * t + 1)
    g = tl.load(_at(grads, t, ALIGNED) + i, mask=touched, other=0.0)
    if factor is not None:
        g *= tl.load(factor)
    average = _at(averages, t, ALIGNED) + i
    m = tl.load(average, mask=touched, other=0.0)
    m += (1.0 - beta1) * (g - m)
    tl.store(average, m, mask=touched)
    square = _at(squares, t, ALIGNED) + i
    v = tl.load(square, mask=touched, other=0.0)
    v = beta2 * v + (1.0 - beta2) * g * g
    tl.store(square, v, mask=touched)
    rate = lr / _one_minus_exp(step * log_beta1)
    spread = tl.sqrt(v) / tl.sqrt(_one_minus_exp(step * log_beta2)) + eps
    param = _at(parameters, t, ALIGNED) + i
    p = tl.load(param, mask=touched)
    tl.store(param, kept * p - rate * m / spread, mask=touched)


# ---------------------------------------------------------------- launches


@lru_cache(maxsize=16)
def _places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The sizes on the device, and for each program its tensor and its block of it."""
    blocks = torch.tensor([cdiv(size, BLOCK) for size in sizes])
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    first = (blocks.cumsum(0) - blocks)[tensor_of.long()]
    block_of = (torch.arange(len(tensor_of)) - first).int()
    return torch.tensor(sizes).to(device), tensor_of.to(device), block_of.to(device)


@lru_cache(maxsize=64)
def _on_device(values: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on the device, without waiting for it. Gradients mostly come back to where they were a step ago."""
    table = torch.tensor(values, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _launch(kernel: Any, lists: dict[str, list[Tensor]], **arguments: Any) -> None:
    """One program for every BLOCK elements. The tensors of one place in all lists have as many elements, or one."""
    some = next(iter(lists.values()))
    device = some[0].device
    sizes = tuple(tensor.numel() for tensor in some)
    addresses = {name: tuple(tensor.data_ptr() for tensor in tensors) for name, tensors in lists.items()}
    aligned = all(number % 16 == 0 for numbers in (sizes, *addresses.values()) for number in numbers)
    for name, tensors in lists.items():
        dtype = torch.float16 if name == "updates" else torch.float32
        assert all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in tensors), name
    tables = {name: _on_device(table, torch.int64, device) for name, table in addresses.items()}
    on_device, tensor_of, block_of = _places(sizes, device)
    places = {"sizes": on_device, "tensor_of": tensor_of, "block_of": block_of}
    kernel[(len(tensor_of),)](**tables, **places, **arguments, BLOCK=BLOCK, ALIGNED=aligned, num_warps=8)


def _partials(tensors: list[Tensor]) -> Tensor:
    """Room for one sum of each program."""
    blocks = sum(cdiv(tensor.numel(), BLOCK) for tensor in tensors)
    return torch.empty(blocks, dtype=torch.float32, device=tensors[0].device)


# ---------------------------------------------------------------- public functions


def global_norm(grads: list[Tensor], max_norm: float, scale: Tensor | None = None) -> Tensor:
    """(norm, factor, 1 where the norm is not finite and else 0) of gradients that are scale times too large."""
    if takes_triton(grads[0]):
        partials = _partials(grads)
        _launch(_squares_kernel, {"grads": grads}, partials=partials)
        found = partials.new_empty(3)
        _clip_kernel[(1,)](partials, found, scale, len(partials), max_norm, CHUNK=CHUNK, num_warps=8)
        return found
    norm = nn.utils.get_total_norm(grads)
    if scale is not None:
        norm = norm / scale
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if scale is not None:
        factor = factor / scale
    return torch.stack([norm, factor, (~norm.isfinite()).to(norm.dtype)])


def _scale_in_place(grads: list[Tensor], factor: Tensor | None) -> None:
    """A CPU's pass over the gradients, where it changes anything: on a CPU to look at the factor is to wait for nothing."""
    if factor is not None and factor != 1:
        torch._foreach_mul_(grads, factor)


def update_dtype(parameter: Tensor) -> torch.dtype:
    """What Muon's updates are made in."""
    return torch.float16 if takes_triton(parameter) else parameter.dtype


def momentum_step(
    grads: list[Tensor],
    averages: list[Tensor],
    updates: list[Tensor],
    momentum: float,
    factor: Tensor | None = None,
    skip: Tensor | None = None,
    normalise: bool = True,
) -> None:
    """Muon's momentum, and into updates, of update_dtype, each matrix's direction with a Frobenius norm of 1.

    normalise: else the directions keep their norms, and what stands in an fp16 tensor is bf16, which has their range.
    """
    if takes_triton(grads[0]):
        partials = _partials(grads)
        lists = {"grads": grads, "averages": averages, "updates": updates}
        _launch(_momentum_kernel, lists, partials=partials, factor=factor, skip=skip, momentum=momentum)
        if normalise:
            _launch(_normalise_kernel, {"updates": updates}, partials=partials, CHUNK=CHUNK)
    elif skip is None or not skip:
        _scale_in_place(grads, factor)
        for grad, average, update in zip(grads, averages, updates, strict=True):
            average.lerp_(grad, 1 - momentum)
            torch.lerp(grad, average, momentum, out=update)
            if normalise:
                update.div_(update.norm().clamp_min(1e-7))


def muon_step(
    parameters: list[Tensor],
    updates: list[Tensor],
    scales: list[float],
    lr: float,
    decay: float,
    skip: Tensor | None = None,
) -> None:
    """Weight decay, and each parameter's step along its update, of update_dtype, times its scale."""
    if takes_triton(parameters[0]):
        lists = {"parameters": parameters, "updates": updates}
        on_device = _on_device(tuple(scales), torch.float32, parameters[0].device)
        _launch(_muon_kernel, lists, scales=on_device, skip=skip, kept=1 - lr * decay, lr=lr)
    elif skip is None or not skip:
        for parameter, update, scale in zip(parameters, updates, scales, strict=True):
            parameter.mul_(1 - lr * decay).add_(update, alpha=-lr * scale)


def adamw_step(
    tensors: AdamWTensors,
    rates: list[Rate],
    share: float,
    betas: tuple[float, float],
    factor: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """AdamW's step, by a share of each parameter's learning rate."""
    if takes_triton(tensors.parameters[0]):
        # of one tensor instead of a list the host would read the value
        counted = 1 if skip is None else [1 - skip] * len(tensors.steps)
        torch._foreach_add_(tensors.steps, counted)  # type: ignore[call-overload]
        flat = tuple(number for rate in rates for number in rate)
        on_device = _on_device(flat, torch.float32, tensors.parameters[0].device)
        logs = [math.log(beta) if beta else -math.inf for beta in betas]
        given = {"rates": on_device, "factor": factor, "skip": skip, "share": share, "eps": EPS}
        given |= {"beta1": betas[0], "beta2": betas[1], "log_beta1": logs[0], "log_beta2": logs[1]}
        _launch(_adamw_kernel, tensors._asdict(), **given)
        return
    _scale_in_place(tensors.grads, factor)
    for rate in dict.fromkeys(rates):
        alike = [index for index, other in enumerate(rates) if other == rate]
        parameters, grads, averages, squares, steps = ([part[index] for index in alike] for part in tensors)
        adamw(
            parameters,
            grads,
            averages,
            squares,
            [],
            steps,
            fused=True,
            found_inf=skip,
            amsgrad=False,
            maximize=False,
            lr=share * rate.lr,
            weight_decay=rate.decay,
            beta1=betas[0],
            beta2=betas[1],
            eps=EPS,
        )

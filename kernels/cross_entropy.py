"""Cross-entropy of logits that exist: one pass over the vocabulary forward, one read and one write backward.

    z = logits[:, :vocab_size], or cap tanh(logits / cap) with a soft cap          lse = log sum_j exp z_j
    loss = (1 - a) (lse - z_t) + a (lse - mean_j z_j) + b lse^2          a: label smoothing, b: z-loss, t: the target
    dloss / dz_j = p_j (1 + 2 b lse) - (1 - a) [j = t] - a / V,  p_j = exp(z_j - lse)
    dlogits = dloss / dz upstream, times 1 - (z / cap)^2 with a soft cap

logits: (N, V) of any float dtype; targets: (N,) integers. loss, lse: (N,) fp32, in nats; dlogits has the logits' dtype.
An ignored row has loss 0 and gradient 0; a row whose target is neither ignored nor in [0, vocab_size) has loss NaN
and gradient NaN. Columns from vocab_size on are padding: they take no part and get gradient 0.
Saved for the backward: logits and lse. Floor, in logits-sized passes: forward 1 read; backward 1 read, 1 write.
Source: label smoothing, Szegedy et al. 2016; z-loss, Chowdhery et al. (PaLM) 2022; soft cap, Gemma 2, 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import accumulation_dtype, cdiv, cpu_kernel, jit, next_power_of_2, tl


def _logits_reference(logits: Tensor, softcap: float, vocab_size: int) -> Tensor:
    z = logits[:, :vocab_size].to(accumulation_dtype(logits.dtype))
    return softcap * torch.tanh(z / softcap) if softcap else z


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of each row in plain PyTorch."""
    z = _logits_reference(logits, softcap, vocab_size)
    lse = torch.logsumexp(z, -1)
    picked = z.gather(1, targets.long().clamp(0, vocab_size - 1).unsqueeze(1)).squeeze(1)
    loss = (1 - label_smoothing) * (lse - picked)
    if label_smoothing:
        loss = loss + label_smoothing * (lse - z.mean(-1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = loss.masked_fill((targets < 0) | (targets >= vocab_size), float("nan"))
    return loss.masked_fill(targets == ignore_index, 0.0), lse


def cross_entropy_backward_reference(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> Tensor:
    """dlogits (N, V) from the rows' upstream gradients dloss (N,), in plain PyTorch."""
    z = _logits_reference(logits, softcap, vocab_size)
    grad = torch.exp(z - lse.unsqueeze(1))
    if z_loss:
        grad = grad * (1 + 2 * z_loss * lse.unsqueeze(1))
    if label_smoothing:
        grad = grad - label_smoothing / vocab_size
    at = targets.long().clamp(0, vocab_size - 1).unsqueeze(1)
    grad = grad.scatter_add(1, at, torch.full_like(at, label_smoothing - 1, dtype=grad.dtype))
    if softcap:
        grad = grad * (1 - (z / softcap).square())
    grad = grad * dloss.to(grad.dtype).unsqueeze(1)
    grad = grad.masked_fill(((targets < 0) | (targets >= vocab_size)).unsqueeze(1), float("nan"))
    grad = grad.masked_fill((targets == ignore_index).unsqueeze(1), 0.0)
    return torch.nn.functional.pad(grad, (0, logits.shape[1] - vocab_size)).to(logits.dtype)


# ---------------------------------------------------------------- Triton


@jit()
def _load_logits(pointers, mask, SOFTCAP: tl.constexpr, LAST_READ: tl.constexpr):
    """Logits in fp32, capped; -inf outside the mask. LAST_READ: the L2 cache may drop them first."""
    POLICY: tl.constexpr = "evict_first" if LAST_READ else ""
    v = tl.load(pointers, mask=mask, other=float("-inf"), eviction_policy=POLICY).to(tl.float32)
    if SOFTCAP > 0:
        v = SOFTCAP * (1.0 - 2.0 / (tl.exp(v * (2.0 / SOFTCAP)) + 1.0))  # cap tanh(v / cap)
        v = tl.where(mask, v, float("-inf"))
    return v


@jit()
def _dlogits(v, columns, target, lse2, upstream, scale,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, VOCAB: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    g = tl.exp2(v * LOG2E - lse2) * scale
    if SMOOTHING > 0:
        g -= upstream * (SMOOTHING / VOCAB)
    g = tl.where(columns == target, g - upstream * (1.0 - SMOOTHING), g)
    if SOFTCAP > 0:
        capped = v * (1.0 / SOFTCAP)
        g *= 1.0 - capped * capped
    return g


@jit(do_not_specialize=["dloss_stride"])
def _rows_kernel(
    logits, targets, loss, lse_rows, dloss, out, dloss_stride,
    IGNORE: tl.constexpr, STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, WIDTH: tl.constexpr, VOCAB: tl.constexpr,
    Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr,
    WRITE_LOSS: tl.constexpr, WRITE_GRAD: tl.constexpr, HAS_DLOSS: tl.constexpr,
    ALIGN: tl.constexpr, LANES: tl.constexpr, LANE_WIDTH: tl.constexpr,
    LOSS_STEPS: tl.constexpr, GRAD_STEPS: tl.constexpr,
):  # fmt: skip
    """One row: its bulk in 32-byte aligned, 16-byte wide accesses; the columns before and after the bulk as `edges`.

    Tiles of the bulk are (steps, LANES, LANE_WIDTH): each lane loads LANE_WIDTH columns in each step.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    COLUMNS: tl.constexpr = LANES * LANE_WIDTH  # of one step
    i = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + i)
    counted = target != IGNORE
    valid = (target >= 0) & (target < VOCAB)
    target = tl.where(valid, target, 0).to(tl.int32)
    start = i * STRIDE
    head = 0
    if STRIDE % ALIGN != 0:
        head = ((ALIGN - start % ALIGN) % ALIGN).to(tl.int32)
    read = tl.where(counted, VOCAB, 0)  # columns to read
    bulk = tl.multiple_of(tl.maximum(read - head, 0) // ALIGN * ALIGN, ALIGN)
    row = logits + tl.multiple_of(start + head, ALIGN)
    e = tl.arange(0, 2 * ALIGN)
    edge = tl.where(e < ALIGN, e, head + bulk + e - ALIGN)  # columns
    edge_mask = ((e >= ALIGN) | (e < head)) & (edge < read)
    edges = _load_logits(logits + start + edge, edge_mask, SOFTCAP, False)
    picked = tl.load(logits + start + target, mask=valid, other=float("nan")).to(tl.float32)
    step = tl.arange(0, LANES)[None, :, None] * LANE_WIDTH + tl.arange(0, LANE_WIDTH)[None, None, :]

    if WRITE_LOSS:
        offsets = tl.arange(0, LOSS_STEPS)[:, None, None] * COLUMNS + step
        m = tl.full((LANES,), float("-inf"), tl.float32)  # the running maximum, in units of ln 2: exp2 needs no scaling
        s = tl.zeros((LANES,), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for k in range(0, bulk, LOSS_STEPS * COLUMNS):
            mask = k + offsets < bulk
            v = _load_logits(row + k + offsets, mask, SOFTCAP, not WRITE_GRAD)
            larger = tl.maximum(m, tl.max(tl.max(v, 2), 0) * LOG2E)
            pivot = tl.where(larger == float("-inf"), 0.0, larger)
            s = s * tl.exp2(m - pivot) + tl.sum(tl.sum(tl.exp2(v * LOG2E - pivot[None, :, None]), 2), 0)
            m = larger
            if SMOOTHING > 0:
                total += tl.sum(tl.sum(tl.where(mask, v, 0.0), 2), 0)
        top = tl.maximum(tl.max(m, 0), tl.max(edges, 0) * LOG2E)
        pivot = tl.where(top == float("-inf"), 0.0, top)
        z = tl.sum(s * tl.exp2(m - pivot), 0) + tl.sum(tl.exp2(edges * LOG2E - pivot), 0)
        lse = (pivot + tl.log2(z)) * LN2
        if SOFTCAP > 0:
            picked = SOFTCAP * (1.0 - 2.0 / (tl.exp(picked * (2.0 / SOFTCAP)) + 1.0))
        nll = (1.0 - SMOOTHING) * (lse - picked)
        if SMOOTHING > 0:
            mean = (tl.sum(total, 0) + tl.sum(tl.where(edge_mask, edges, 0.0), 0)) * (1.0 / VOCAB)
            nll += SMOOTHING * (lse - mean)
        if Z_LOSS > 0:
            nll += Z_LOSS * lse * lse
        lse = tl.where(counted, lse, 0.0)
        tl.store(loss + i, tl.where(counted, nll, 0.0))
        tl.store(lse_rows + i, lse)
    else:
        lse = tl.load(lse_rows + i)

    if WRITE_GRAD:
        upstream = 1.0
        if HAS_DLOSS:
            upstream = tl.load(dloss + i * dloss_stride).to(tl.float32)
        upstream = tl.where(valid, upstream, float("nan"))
        scale = upstream * (1.0 + 2.0 * Z_LOSS * lse)
        lse2 = lse * LOG2E
        dtype = out.dtype.element_ty
        to = out + i * OUT_STRIDE
        to_bulk = to + head
        tl.debug_barrier()  # out may be logits: every warp has its copy of the edges before one of them is overwritten
        if OUT_STRIDE % ALIGN == STRIDE % ALIGN:
            to_bulk = out + tl.multiple_of(i * OUT_STRIDE + head, ALIGN)
        offsets = tl.arange(0, GRAD_STEPS)[:, None, None] * COLUMNS + step
        for k in range(0, bulk, GRAD_STEPS * COLUMNS):
            mask = k + offsets < bulk
            v = _load_logits(row + k + offsets, mask, SOFTCAP, True)
            g = _dlogits(v, offsets, target - head - k, lse2, upstream, scale, SMOOTHING, SOFTCAP, VOCAB)
            tl.store(to_bulk + k + offsets, g.to(dtype), mask=mask, eviction_policy="evict_first")
        g = _dlogits(edges, edge, target, lse2, upstream, scale, SMOOTHING, SOFTCAP, VOCAB)
        tl.store(to + edge, g.to(dtype), mask=edge_mask)
        for k in range(read, WIDTH, COLUMNS):  # padding columns, or the whole of an ignored row
            j = k + tl.arange(0, COLUMNS)
            tl.store(to + j, tl.zeros((COLUMNS,), dtype), mask=j < WIDTH)


def row_warps(row_bytes: int) -> int:
    """Warps of a row's program: so many that the rows in flight fit in the L2 cache, where their second read finds them.

    One for each 6,400 bytes of the row, at most 32. A multiprocessor runs 48 warps of 40 registers a thread, so that at
    most 307 KB of rows are in flight on it: 41 MB on an H100, whose L2 cache has 52. docs/kernels.md counts them.
    """
    return min(32, next_power_of_2(cdiv(row_bytes, 6400)))


def launch_rows(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    lse: Tensor,
    dloss: Tensor | None,
    out: Tensor | None,
    options: tuple[int, float, float, float, int],
) -> None:
    """Fill loss and lse, unless loss is empty; fill out with the logits' gradient, unless it is None. out may be
    logits itself.

    Each lane keeps a running maximum of its own, so that rescaling costs an exponential for 16 logits of 16 bits and
    no communication until the row's end. The second pass of a program that makes both loss and gradient reads one step at
    a time: its loads come from the L2 cache, and more would take more registers than the first pass.
    """
    ignore_index, z_loss, label_smoothing, softcap, vocab_size = options
    n, width = logits.shape
    warps = row_warps(vocab_size * logits.element_size())
    write_loss = loss.numel() > 0
    if n:
        _rows_kernel[(n,)](
            logits, targets.contiguous(), loss, lse, lse if dloss is None else dloss, logits if out is None else out,
            0 if dloss is None else dloss.stride(0), ignore_index, logits.stride(0),
            (logits if out is None else out).stride(0), width, vocab_size, z_loss, label_smoothing, softcap,
            write_loss, out is not None, dloss is not None, 32 // logits.element_size(), 32 * warps,
            16 // logits.element_size(), 2, 1 if write_loss else 2, num_warps=warps,
        )  # fmt: skip


# ---------------------------------------------------------------- registration


@torch.library.custom_op("fastlm::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    loss, lse = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    launch_rows(rows, targets, loss, lse, None, None, (ignore_index, z_loss, label_smoothing, softcap, vocab_size))
    return loss, lse


@torch.library.custom_op("fastlm::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> Tensor:
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    out = logits.new_empty(logits.shape)
    options = (ignore_index, z_loss, label_smoothing, softcap, vocab_size)
    launch_rows(rows, targets, lse.new_empty(0), lse, dloss, out, options)
    return out


def _cross_entropy_cpu(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    options = (ignore_index, z_loss, label_smoothing, softcap, vocab_size)
    return (native.cross_entropy if native.available(logits) else cross_entropy_reference)(logits, targets, *options)


cpu_kernel(_cross_entropy, _cross_entropy_cpu)


def _cross_entropy_backward_cpu(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
) -> Tensor:
    backward = native.cross_entropy_backward if native.available(logits) else cross_entropy_backward_reference
    return backward(dloss, logits, targets, lse, ignore_index, z_loss, label_smoothing, softcap, vocab_size)


cpu_kernel(_cross_entropy_backward, _cross_entropy_backward_cpu)


@_cross_entropy.register_fake
def _(logits, targets, ignore_index, z_loss, label_smoothing, softcap, vocab_size):
    loss = logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


@_cross_entropy_backward.register_fake
def _(dloss, logits, targets, lse, ignore_index, z_loss, label_smoothing, softcap, vocab_size):
    return logits.new_empty(logits.shape)


def _setup(ctx, inputs, output) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, _):
    dlogits = None if dloss is None else _cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options)
    return dlogits, None, None, None, None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_setup)


def check_options(name: str, reduction: str, label_smoothing: float, softcap: float, vocab_size: int, width: int) -> None:
    """Raise ValueError, with the call's name in front, for an option that makes no sense."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}, expected 'mean', 'sum' or 'none'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}, expected 0 to 1")
    if softcap < 0:
        raise ValueError(f"{name}: softcap is {softcap}, expected a positive bound, or 0 for none")
    if not 0 < vocab_size <= width:
        raise ValueError(f"{name}: vocab_size is {vocab_size}, expected 1 to {width}, the number of columns")


def mean_over_counted(total: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """total divided by the number of targets that count; 0 where none does. No host sync."""
    return total / (targets != ignore_index).sum().clamp(min=1)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Cross-entropy in nats: (1 - a) (lse - z_t) + a (lse - mean z) + b lse^2 per row; a label_smoothing, b z_loss.

    logits (..., V), targets (...) integers; columns from vocab_size on are padding. Returns fp32 whatever autocast
    says: a scalar for "mean" (over targets other than ignore_index; 0 if there are none) and "sum", targets' shape
    for "none". A target out of range makes its row NaN. Raises ValueError on shapes or options that do not fit.
    """
    width = logits.shape[-1]
    vocab_size = width if vocab_size is None else vocab_size
    check_options("cross_entropy", reduction, label_smoothing, softcap, vocab_size, width)
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: targets {tuple(targets.shape)} must be logits' shape without the last dimension, "
            f"{tuple(logits.shape[:-1])}"
        )
    loss, _ = _cross_entropy(
        logits.reshape(-1, width), targets.reshape(-1), ignore_index, z_loss, label_smoothing, softcap, vocab_size
    )
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else mean_over_counted(loss.sum(), targets, ignore_index)

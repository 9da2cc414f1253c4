"""Cross-entropy on a GPU: a program for each row, for its loss, its gradient, or both in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.common import cdiv, next_power_of_2
from fastlm.kernels.loss_options import LossOptions


@triton.jit
def load_logits(
    pointers: tl.tensor,
    mask: tl.tensor,
    SOFTCAP: tl.constexpr,
    LAST_READ: tl.constexpr,
) -> tl.tensor:
    """Logits in fp32, capped; -inf outside the mask. LAST_READ: the L2 cache may drop them."""
    POLICY: tl.constexpr = "evict_first" if LAST_READ else ""
    v = tl.load(pointers, mask=mask, other=float("-inf"), eviction_policy=POLICY).to(tl.float32)
    if SOFTCAP > 0:
        v = SOFTCAP * (1.0 - 2.0 / (tl.exp(v * (2.0 / SOFTCAP)) + 1.0))  # cap tanh(v / cap)
        v = tl.where(mask, v, float("-inf"))
    return v


@triton.jit
def logits_gradient(
    v: tl.tensor,  # logits, capped
    columns: tl.tensor,  # their columns, counted from where target is counted from
    target: tl.tensor,
    lse2: tl.tensor,  # the row's log-sum-exp in units of ln 2
    upstream: tl.tensor,
    scale: tl.tensor,  # of the probabilities: upstream (1 + 2 z_loss lse)
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    VOCAB: tl.constexpr,
) -> tl.tensor:
    LOG2E: tl.constexpr = 1.4426950408889634
    g = tl.exp2(v * LOG2E - lse2) * scale
    if SMOOTHING > 0:
        g -= upstream * (SMOOTHING / VOCAB)
    g = tl.where(columns == target, g - upstream * (1.0 - SMOOTHING), g)
    if SOFTCAP > 0:
        capped = v * (1.0 / SOFTCAP)
        g *= 1.0 - capped * capped
    return g


@triton.jit(do_not_specialize=["dloss_stride"])
def cross_entropy_kernel(
    logits: tl.tensor,  # (N, WIDTH), rows STRIDE apart
    targets: tl.tensor,  # (N,)
    loss: tl.tensor,  # (N,)
    lse_rows: tl.tensor,  # (N,)
    dloss: tl.tensor,  # (N,), dloss_stride apart
    out: tl.tensor,  # (N, WIDTH), rows OUT_STRIDE apart: the logits' gradient
    dloss_stride: tl.tensor,
    IGNORE: tl.constexpr,
    STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    VOCAB: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WRITE_LOSS: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    HAS_DLOSS: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    LANE_WIDTH: tl.constexpr,
    LOSS_STEPS: tl.constexpr,
    GRAD_STEPS: tl.constexpr,
) -> None:
    """One row: its bulk in 32-byte aligned, 16-byte wide accesses, what is beside it as `edges`.

    Tiles of the bulk are (steps, LANES, LANE_WIDTH): a lane loads LANE_WIDTH columns in a step.
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
    edges = load_logits(logits + start + edge, edge_mask, SOFTCAP, False)
    picked = tl.load(logits + start + target, mask=valid, other=float("nan")).to(tl.float32)
    lane = tl.arange(0, LANES)[None, :, None]
    step = lane * LANE_WIDTH + tl.arange(0, LANE_WIDTH)[None, None, :]

    if WRITE_LOSS:
        offsets = tl.arange(0, LOSS_STEPS)[:, None, None] * COLUMNS + step
        # the running maximum, in units of ln 2: exp2 needs no scaling
        m = tl.full((LANES,), float("-inf"), tl.float32)
        s = tl.zeros((LANES,), tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for k in range(0, bulk, LOSS_STEPS * COLUMNS):
            mask = k + offsets < bulk
            v = load_logits(row + k + offsets, mask, SOFTCAP, not WRITE_GRAD)
            larger = tl.maximum(m, tl.max(tl.max(v, 2), 0) * LOG2E)
            pivot = tl.where(larger == float("-inf"), 0.0, larger)
            s = s * tl.exp2(m - pivot)
            s += tl.sum(tl.sum(tl.exp2(v * LOG2E - pivot[None, :, None]), 2), 0)
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
            at_edges = tl.sum(tl.where(edge_mask, edges, 0.0), 0)
            mean = (tl.sum(total, 0) + at_edges) * (1.0 / VOCAB)
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
        # out may be logits: every warp has its copy of the edges before one of them is overwritten
        tl.debug_barrier()
        if OUT_STRIDE % ALIGN == STRIDE % ALIGN:
            to_bulk = out + tl.multiple_of(i * OUT_STRIDE + head, ALIGN)
        offsets = tl.arange(0, GRAD_STEPS)[:, None, None] * COLUMNS + step
        for k in range(0, bulk, GRAD_STEPS * COLUMNS):
            mask = k + offsets < bulk
            v = load_logits(row + k + offsets, mask, SOFTCAP, True)
            target_in_bulk = target - head - k
            g = logits_gradient(
                v, offsets, target_in_bulk, lse2, upstream, scale, SMOOTHING, SOFTCAP, VOCAB
            )
            tl.store(to_bulk + k + offsets, g.to(dtype), mask=mask, eviction_policy="evict_first")
        g = logits_gradient(edges, edge, target, lse2, upstream, scale, SMOOTHING, SOFTCAP, VOCAB)
        tl.store(to + edge, g.to(dtype), mask=edge_mask)
        for k in range(read, WIDTH, COLUMNS):  # padding columns, or the whole of an ignored row
            j = k + tl.arange(0, COLUMNS)
            tl.store(to + j, tl.zeros((COLUMNS,), dtype), mask=j < WIDTH)


def row_warps(row_bytes: int) -> int:
    """Warps of a row's program: so many that the rows in flight fit in the L2 cache.

    There their second read finds them. One for each 6,400 bytes of the row, at most 32. A
    multiprocessor runs 48 warps of 40 registers a thread, so that at most 307 KB of rows are in
    flight on it: 41 MB on an H100, whose L2 cache has 52. docs/kernels.md counts them.
    """
    return min(32, next_power_of_2(cdiv(row_bytes, 6400)))


def rows(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    options: LossOptions,
) -> None:
    """Fill loss and lse (N,), or read lse where loss is None; fill dlogits, unless it is None.

    dlogits may be logits. Each lane keeps a running maximum of its own, so that rescaling costs an
    exponential for 16 logits of 16 bits and no communication until the row's end. The second pass
    of a program that makes both loss and gradient reads one step at a time: its loads come from the
    L2 cache, and more would take more registers than the first pass.
    """
    n, width = logits.shape
    if n == 0:
        return
    out = logits if dlogits is None else dlogits
    vocab_size = options.columns(width)
    item = logits.element_size()
    warps = row_warps(vocab_size * item)
    cross_entropy_kernel[(n,)](
        logits=logits,
        targets=targets.contiguous(),
        loss=lse if loss is None else loss,
        lse_rows=lse,
        dloss=lse if dloss is None else dloss,
        out=out,
        dloss_stride=0 if dloss is None else dloss.stride(0),
        IGNORE=options.ignore_index,
        STRIDE=logits.stride(0),
        OUT_STRIDE=out.stride(0),
        WIDTH=width,
        VOCAB=vocab_size,
        Z_LOSS=options.z_loss,
        SMOOTHING=options.label_smoothing,
        SOFTCAP=options.softcap,
        WRITE_LOSS=loss is not None,
        WRITE_GRAD=dlogits is not None,
        HAS_DLOSS=dloss is not None,
        ALIGN=32 // item,
        LANES=32 * warps,
        LANE_WIDTH=16 // item,
        LOSS_STEPS=2,
        GRAD_STEPS=2 if loss is None else 1,
        num_warps=warps,
    )

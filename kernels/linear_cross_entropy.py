"""Cross-entropy behind the head's matmul, without ever holding the (N, V) logits.

    logits = h W^T (+ bias), in chunks of rows whose logits fit in chunk_bytes; the loss of a row is cross_entropy.py's.
    dh = dlogits W          dW = dlogits^T h, added up in fp32 over the chunks          dbias = sum of dlogits' rows

h: (N, D); W: (V, D); bias: (V,). The matmuls run in h's dtype (autocast's, where it is on); loss and lse are fp32.
"sum" and "mean": the forward leaves dh and dW ready, so that a step takes 3 matmuls; the backward scales them.
"none" (and linear_logprobs): the forward keeps lse, the backward makes each chunk's logits again: 4 matmuls. Where keep_bytes
allows it, logits are kept and not made again: between 3 and 4 matmuls.
On a CPU, rows whose target is ignored are dropped before the matmul. Elsewhere that would need the count on the host,
hence a synchronisation: pass max_counted, a bound the host knows, and only that many rows are multiplied.
Beside the matmuls, in chunk-of-logits-sized passes: 2 reads and 1 write in the fused forward; 1 read in a forward
alone, 1 read and 1 write in the recomputing backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import accumulation_dtype, cdiv, cpu_kernel, matmul_dtype
from fastlm.kernels.cross_entropy import (
    check_options,
    cross_entropy_backward_reference,
    cross_entropy_reference,
    launch_rows,
    mean_over_counted,
)

# Bytes of logits at a time, where the caller does not say. On a GPU 256 MiB, or a 64th of its memory where that is more. On a
# CPU as many rows as there are columns in the weight, so that the logits take what the weight takes, but 256 to 512, and 50 to
# 200 MiB. There 512 rows of 50,257 take 2 to 5% less time than 256 and 15% less than 128 (D = 256).
CHUNK_BYTES = 256 << 20

# The part of dh that one multiprocessor computes at a time in the matmuls of cuBLAS, rows and columns.
TILE = (128, 256)

# Bytes of logits that the forward of "none" keeps for its backward on a CPU, where the caller does not say.
KEPT_BYTES = 256 << 20


def cpu_chunk_bytes(width: int, depth: int, element_size: int) -> int:
    rows = max(256, min(depth, 512))
    return max(50 << 20, min(200 << 20, rows * width * element_size))


def gpu_chunk_rows(n: int, row_bytes: int, depth: int, memory_bytes: int, multiprocessors: int) -> int:
    """Rows of logits in a chunk on such a GPU: as many as fill all of its multiprocessors with tiles of dh (n, depth), a whole
    number of times, within a 64th of its memory. Where not even one such wave fits, as many as fit in 256 MiB.

    It depends on the GPU's size and not on what is free at the moment: another chunk is another order of dW's additions, so
    that a second run would not give the same bits.
    """
    most = max(CHUNK_BYTES, memory_bytes // 64) // row_bytes
    wave = max(1, multiprocessors // cdiv(depth, TILE[1])) * TILE[0]
    return min(n, most // wave * wave) if most >= wave else chunk_rows(n, row_bytes, CHUNK_BYTES)


# A row kernel takes (logits (n, V), targets (n,), loss (n,), lse (n,), dloss (n,) or None, write_loss, grad (n, V) or None,
# *options). It fills loss and lse where write_loss and reads lse otherwise; grad, which may be logits, becomes their
# gradient times dloss.
RowKernel = Callable[..., None]
Options = tuple[int, float, float, float, int]  # ignore_index, z_loss, label_smoothing, softcap, vocab_size


def _rows_cpu(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    lse: Tensor,
    dloss: Tensor | None,
    write_loss: bool,
    grad: Tensor | None,
    *options: Any,
) -> None:
    if native.available(logits):
        native.cross_entropy_rows(logits, targets, loss if write_loss else None, lse, dloss, grad, *options)
        return
    if write_loss:
        rows = cross_entropy_reference(logits, targets, *options)
        loss.copy_(rows[0])
        lse.copy_(rows[1])
    if grad is not None:
        upstream = torch.ones_like(lse) if dloss is None else dloss
        grad.copy_(cross_entropy_backward_reference(upstream, logits, targets, lse, *options))


def _rows_triton(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    lse: Tensor,
    dloss: Tensor | None,
    write_loss: bool,
    grad: Tensor | None,
    *options: Any,
) -> None:
    launch_rows(logits, targets, loss if write_loss else loss[:0], lse, dloss, grad, options)


# ---------------------------------------------------------------- the chunk loop


def _counted_rows(on_cpu: bool, targets: Tensor, ignore_index: int, max_counted: int) -> Tensor | None:
    """Indices of the rows to multiply, or None for all of them. max_counted < 0: not known."""
    if on_cpu:
        keep = (targets != ignore_index).nonzero().squeeze(1)
        return None if len(keep) == len(targets) else keep
    if 0 <= max_counted < len(targets):
        return (targets == ignore_index).to(torch.int8).argsort(stable=True)[:max_counted]
    return None


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b (total = a b at first) with total in fp32 or fp64 and no rounding of the product in between."""
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def rows_at_a_time(h: Tensor, width: int, chunk_bytes: int) -> int:
    """Rows of logits in a chunk for h (N, D): what fits in chunk_bytes, or where that is 0 what suits the device."""
    row_bytes = width * h.element_size()
    if chunk_bytes == 0 and h.is_cuda:
        gpu = torch.cuda.get_device_properties(h.device)
        return gpu_chunk_rows(len(h), row_bytes, h.shape[1], gpu.total_memory, gpu.multi_processor_count)
    if chunk_bytes == 0:
        chunk_bytes = cpu_chunk_bytes(width, h.shape[1], h.element_size())
    return chunk_rows(len(h), row_bytes, chunk_bytes)


def chunk_rows(n: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of logits in a chunk: as many as fit in chunk_bytes, in multiples of 128 where that leaves any, evenly
    spread over n."""
    most = max(1, chunk_bytes // row_bytes)
    if most < 128:
        return most
    chunks = max(1, -(-n // (most // 128 * 128)))
    return max(1, -(-n // (chunks * 128))) * 128


def room(like: Tensor, rows: int, width: int) -> Tensor:
    """For rows of logits: each starts at a multiple of 128 bytes, whatever the vocabulary's size."""
    return like.new_empty(rows, -(-width // 64) * 64)


def run_chunks(
    rows: RowKernel,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dloss: Tensor | None,
    lse: Tensor | None,
    options: Options,
    chunk_bytes: int,
    max_counted: int,
    need_dh: bool,
    need_dw: bool,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (N,), lse (N,), dh, dW, dbias), chunk by chunk. With lse given the loss is not computed. Gradients not
    needed are empty. kept: room for the first chunks' logits, filled where lse is not given and read where it is."""
    width, acc = len(weight), accumulation_dtype(h.dtype)
    counted = _counted_rows(rows is _rows_cpu, targets, options[0], max_counted)
    all_h, all_lse = h, lse
    if counted is not None:
        h, targets = h[counted], targets[counted]
        dloss, lse = (t if t is None else t[counted] for t in (dloss, lse))
    n, forward, backward = len(h), lse is None, need_dh or need_dw
    loss = h.new_empty(n, dtype=acc)
    lse = h.new_empty(n, dtype=acc) if lse is None else lse
    dh = h.new_empty(h.shape if need_dh else (0,))
    make = torch.zeros if n == 0 else torch.empty  # the first chunk writes, the others add
    dw = make(weight.shape if need_dw else (0,), dtype=acc, device=h.device)
    db = torch.zeros(width if need_dw and bias is not None else 0, dtype=acc, device=h.device)
    w, b = weight.to(h.dtype), None if bias is None else bias.to(h.dtype)
    size = rows_at_a_time(h, width, chunk_bytes)
    buffer = room(h, min(size, n), width)[:, :width]
    for start in range(0, n, size):
        at = slice(start, min(start + size, n))
        grad = buffer[: at.stop - start]
        keeps = at.stop <= len(kept)
        logits = kept[at, :width] if keeps else grad
        if forward or not keeps:
            if b is None:
                torch.mm(h[at], w.t(), out=logits)
            else:
                torch.addmm(b, h[at], w.t(), out=logits)
        upstream = None if dloss is None else dloss[at]
        rows(logits, targets[at], loss[at], lse[at], upstream, forward, grad if backward else None, *options)
        if need_dh:
            torch.mm(grad, w, out=dh[at])
        if need_dw:
            _add_product(dw, grad.t(), h[at], first=start == 0)
            if bias is not None:
                db += grad.sum(0, dtype=acc)
    if counted is not None:
        loss, dh = _spread(loss, counted, len(all_h)), _spread(dh, counted, len(all_h)) if need_dh else dh
        lse = _spread(lse, counted, len(all_h)) if all_lse is None else all_lse
    return loss, lse, dh, dw, db


def _spread(part: Tensor, indices: Tensor, n: int) -> Tensor:
    """part's rows at these indices of n rows, zeros elsewhere."""
    return part.new_zeros(n, *part.shape[1:]).index_copy_(0, indices, part)


def _fused(rows: RowKernel, h, weight, bias, targets, *rest):
    *options, chunk_bytes, max_counted, need_dh, need_dw = rest
    limits = (chunk_bytes, max_counted, need_dh, need_dw, room(h, 0, len(weight)))
    loss, _, dh, dw, db = run_chunks(rows, h, weight, bias, targets, None, None, tuple(options), *limits)
    return loss.sum(), dh, dw, db


def _nll(rows: RowKernel, h, weight, bias, targets, *rest):
    *options, chunk_bytes, max_counted, kept_rows = rest
    kept = room(h, kept_rows, len(weight))
    limits = (chunk_bytes, max_counted, False, False, kept)
    return *run_chunks(rows, h, weight, bias, targets, None, None, tuple(options), *limits)[:2], kept


def _nll_backward(rows: RowKernel, dloss, h, weight, bias, targets, lse, kept, *rest):
    *options, chunk_bytes, max_counted, need_dh, need_dw = rest
    limits = (chunk_bytes, max_counted, need_dh, need_dw, kept)
    return run_chunks(rows, h, weight, bias, targets, dloss, lse, tuple(options), *limits)[2:]


# ---------------------------------------------------------------- registration


@torch.library.custom_op("fastlm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
    chunk_bytes: int,
    max_counted: int,
    need_dh: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (ignore_index, z_loss, label_smoothing, softcap, vocab_size)
    return _fused(_rows_triton, h, weight, bias, targets, *options, chunk_bytes, max_counted, need_dh, need_dw)


@torch.library.custom_op("fastlm::linear_nll", mutates_args=())
def _linear_nll(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
    chunk_bytes: int,
    max_counted: int,
    kept_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (ignore_index, z_loss, label_smoothing, softcap, vocab_size)
    return _nll(_rows_triton, h, weight, bias, targets, *options, chunk_bytes, max_counted, kept_rows)


@torch.library.custom_op("fastlm::linear_nll_backward", mutates_args=())
def _linear_nll_backward(
    dloss: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    kept: Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float,
    vocab_size: int,
    chunk_bytes: int,
    max_counted: int,
    need_dh: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (ignore_index, z_loss, label_smoothing, softcap, vocab_size)
    limits = (chunk_bytes, max_counted, need_dh, need_dw)
    return _nll_backward(_rows_triton, dloss, h, weight, bias, targets, lse, kept, *options, *limits)


cpu_kernel(_linear_cross_entropy, partial(_fused, _rows_cpu))
cpu_kernel(_linear_nll, partial(_nll, _rows_cpu))
cpu_kernel(_linear_nll_backward, partial(_nll_backward, _rows_cpu))


def _gradients_like(h: Tensor, weight: Tensor, bias: Tensor | None, need_dh: bool, need_dw: bool) -> tuple[Tensor, ...]:
    acc = accumulation_dtype(h.dtype)
    return (
        h.new_empty(h.shape if need_dh else (0,)),
        weight.new_empty(weight.shape if need_dw else (0,), dtype=acc),
        weight.new_empty(len(weight) if need_dw and bias is not None else 0, dtype=acc),
    )


@_linear_cross_entropy.register_fake
def _(h, weight, bias, targets, *rest):
    return h.new_empty((), dtype=accumulation_dtype(h.dtype)), *_gradients_like(h, weight, bias, *rest[-2:])


@_linear_nll.register_fake
def _(h, weight, bias, targets, *rest):
    loss = h.new_empty(h.shape[0], dtype=accumulation_dtype(h.dtype))
    return loss, torch.empty_like(loss), room(h, rest[-1], weight.shape[0])


@_linear_nll_backward.register_fake
def _(dloss, h, weight, bias, targets, lse, kept, *rest):
    return _gradients_like(h, weight, bias, *rest[-2:])


def _setup(ctx, inputs, output) -> None:
    ctx.need_dh, ctx.need_dw, ctx.has_bias = inputs[-2], inputs[-1], inputs[2] is not None
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    grads = [None, None, None]
    if dloss is not None:
        wanted = (ctx.need_dh, ctx.need_dw, ctx.need_dw and ctx.has_bias)
        saved = ctx.saved_tensors
        for i in (1, 0, 2):  # the largest first: it fits where the forward's logits were
            if wanted[i]:
                grads[i] = (saved[i] * dloss).to(ctx.dtypes[i])
    return (*grads, *[None] * 10)


def _nll_setup(ctx, inputs, output) -> None:
    h, weight, bias, targets, *ctx.options, _ = inputs
    ctx.save_for_backward(h, weight, bias, targets, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _nll_backward_formula(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 12
    h, weight, bias, targets, lse, kept = ctx.saved_tensors
    need_dh, need_dw = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    dh, dw, db = _linear_nll_backward(dloss, h, weight, bias, targets, lse, kept, *ctx.options, need_dh, need_dw)
    grads = (
        dh if need_dh else None,
        dw.to(weight.dtype) if need_dw else None,
        db.to(bias.dtype) if need_dw and bias is not None else None,
    )
    return (*grads, *[None] * 9)


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup)
_linear_nll.register_autograd(_nll_backward_formula, setup_context=_nll_setup)


def linear_nll(
    name: str,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: tuple[int, float, float, float, int | None],
    reduction: str,
    chunk_bytes: int | None,
    max_counted: int | None,
    keep_bytes: int | None,
) -> Tensor:
    """The loss of each row ("none"), or their sum; the checks and the dtype rules of linear_cross_entropy and
    linear_logprobs."""
    ignore_index, z_loss, label_smoothing, softcap, vocab_size = options
    vocab_size = len(weight) if vocab_size is None else vocab_size
    check_options(name, reduction, label_smoothing, softcap, vocab_size, len(weight))
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1]:
        raise ValueError(f"{name}: h {tuple(h.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)")
    if targets.shape != h.shape[:1]:
        raise ValueError(f"{name}: targets {tuple(targets.shape)} must be (N,) = ({h.shape[0]},)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias {tuple(bias.shape)} must be (V,) = ({len(weight)},)")
    h = h.to(matmul_dtype(h))
    if keep_bytes is None:
        keep_bytes = KEPT_BYTES if h.device.type == "cpu" and chunk_bytes is None else 0
    args = (h, weight, bias, targets, ignore_index, z_loss, label_smoothing, softcap, vocab_size, chunk_bytes or 0)
    limit, grad = -1 if max_counted is None else max_counted, torch.is_grad_enabled()
    need_dh, need_dw = h.requires_grad, weight.requires_grad or (bias is not None and bias.requires_grad)
    if reduction == "none":
        most = len(h) if max_counted is None else min(len(h), max_counted)
        kept_rows = min(most, keep_bytes // (len(weight) * h.element_size())) if grad and (need_dh or need_dw) else 0
        return _linear_nll(*args, limit, kept_rows)[0]
    return _linear_cross_entropy(*args, limit, grad and need_dh, grad and need_dw)[0]


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    max_counted: int | None = None,
    keep_bytes: int | None = None,
) -> Tensor:
    """cross_entropy(h W^T + bias, targets) in nats, without ever holding the (N, V) logits: at most chunk_bytes of
    them (None: 256 MiB or a 64th of the GPU's memory, on a CPU 50 to 200 MiB).

    h (N, D), weight (V, D), bias (V,), targets (N,) integers; columns from vocab_size on are padding. Returns fp32
    whatever autocast says, a scalar, or (N,) for "none". The matmuls run in h's dtype, or autocast's; dW is added up in
    fp32. max_counted: the caller's promise that at most so many targets count; the others then cost no matmul (on a CPU
    they never do). keep_bytes: so many bytes of logits, where gradients are wanted, does the forward of "none" keep for
    the backward, which need not make them again and has the same bits (None: 256 MiB on a CPU if chunk_bytes is None,
    none elsewhere). Gradients of gradients are not defined. Raises ValueError on shapes or options that do not fit.
    """
    options = (ignore_index, z_loss, label_smoothing, softcap, vocab_size)
    loss = linear_nll(
        "linear_cross_entropy", h, weight, bias, targets, options, reduction, chunk_bytes, max_counted, keep_bytes
    )
    return mean_over_counted(loss, targets, ignore_index) if reduction == "mean" else loss

"""The head's logits in chunks of rows: how many rows at a time, and the three loops over them.

    z = h W^T (+ bias)          dh = dz W          dW = dz^T h          dbias = sum of dz's rows

    loss_and_gradients    z -> loss, lse and, in z's place, dz -> dh, dW, dbias: 3 matmuls
    forward               z -> loss, lse; the first rows' z are kept where there is room
    backward              z, kept or made again -> dz -> dh, dW, dbias

h: (N, D); W: (V, D); bias: (V,). A chunk's z and dz are all that is ever held of (N, V). dW and
dbias are added up in fp32 (fp64 for fp64) over the chunks.

On a CPU, rows whose target is ignored are dropped before the matmuls. Elsewhere that would need
their count on the host, hence a synchronisation: where the caller knows a bound, max_counted, only
so many rows are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.kernels.common import accumulation_dtype, cdiv, takes_triton
from fastlm.kernels.cross_entropy import cross_entropy_rows
from fastlm.kernels.loss_options import LossOptions

# Bytes of logits at a time, where the caller does not say. On a GPU 256 MiB, or a 64th of its
# memory where that is more. On a CPU as many rows as there are columns in the weight, so that the
# logits take what the weight takes, but 256 to 512, and 50 to 200 MiB. There 512 rows of 50,257
# take 2 to 5% less time than 256 and 15% less than 128 (D = 256).
CHUNK_BYTES = 256 << 20

# The part of dh that one multiprocessor computes at a time in cuBLAS's matmuls, rows and columns.
TILE = (128, 256)

# Bytes of logits that forward() keeps for backward() on a CPU, where the caller does not say.
KEPT_BYTES = 256 << 20


# ---------------------------------------------------------------- how many rows


def cpu_chunk_bytes(width: int, depth: int, element_size: int) -> int:
    """Bytes of logits at a time on a CPU, of a weight (width, depth)."""
    rows = max(256, min(depth, 512))
    return max(50 << 20, min(200 << 20, rows * width * element_size))


def gpu_chunk_rows(
    n: int, row_bytes: int, depth: int, memory_bytes: int, multiprocessors: int
) -> int:
    """Rows of logits in a chunk on a GPU of that size.

    As many as fill all of its multiprocessors with tiles of dh (n, depth), a whole number of times,
    within a 64th of its memory. Where not even one such wave fits, as many as fit in 256 MiB. It
    depends on the GPU's size and not on what is free at the moment: another chunk is another order
    of dW's additions, so that a second run would not give the same bits.
    """
    most = max(CHUNK_BYTES, memory_bytes // 64) // row_bytes
    wave = max(1, multiprocessors // cdiv(depth, TILE[1])) * TILE[0]
    if most < wave:
        return chunk_rows(n, row_bytes, CHUNK_BYTES)
    return min(n, most // wave * wave)


def chunk_rows(n: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of logits in a chunk: as many as fit in chunk_bytes, evenly spread over n.

    In multiples of 128 where that leaves any.
    """
    most = max(1, chunk_bytes // row_bytes)
    if most < 128:
        return most
    chunks = max(1, cdiv(n, most // 128 * 128))
    return max(1, cdiv(n, chunks * 128)) * 128


def rows_at_a_time(h: Tensor, width: int, chunk_bytes: int) -> int:
    """Rows of logits in a chunk for h (N, D); chunk_bytes 0: what suits its device."""
    n, depth = h.shape
    row_bytes = width * h.element_size()
    if chunk_bytes == 0 and h.is_cuda:
        gpu = torch.cuda.get_device_properties(h.device)
        size = gpu.total_memory, gpu.multi_processor_count
        return gpu_chunk_rows(n, row_bytes, depth, *size)
    if chunk_bytes == 0:
        chunk_bytes = cpu_chunk_bytes(width, depth, h.element_size())
    return chunk_rows(n, row_bytes, chunk_bytes)


def kept_rows(h: Tensor, width: int, max_counted: int, keep_bytes: int) -> int:
    """How many rows of logits forward() keeps: those of keep_bytes, or where that is < 0 of the
    default; max_counted < 0: not known.
    """
    most = len(h) if max_counted < 0 else min(len(h), max_counted)
    if keep_bytes < 0:
        keep_bytes = KEPT_BYTES if h.device.type == "cpu" else 0
    return min(most, keep_bytes // (width * h.element_size()))


def room(like: Tensor, rows: int, width: int) -> Tensor:
    """For rows of logits: each starts at a multiple of 128 bytes, whatever the width."""
    return like.new_empty(rows, cdiv(width, 64) * 64)


# ---------------------------------------------------------------- what the loops work on


@dataclass(frozen=True)
class Head:
    """The rows that count, and the head in their dtype."""

    h: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (n,)
    counted: Tensor | None  # (n,), these rows' numbers among all N; None: they are all of them
    total: int  # N

    def logits(self, at: slice, out: Tensor) -> Tensor:
        """z of those rows, in out."""
        if self.bias is None:
            return torch.mm(self.h[at], self.weight.t(), out=out)
        return torch.addmm(self.bias, self.h[at], self.weight.t(), out=out)

    def gather(self, x: Tensor) -> Tensor:
        """Of x (N, ...) the rows that count."""
        return x if self.counted is None else x[self.counted]

    def spread(self, x: Tensor) -> Tensor:
        """x (n, ...) of the rows that count among all N, zeros elsewhere."""
        if self.counted is None:
            return x
        return x.new_zeros(self.total, *x.shape[1:]).index_copy_(0, self.counted, x)


def head_of(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    max_counted: int,
) -> Head:
    """The head over the rows to multiply; max_counted < 0: not known."""
    counted = None
    if not takes_triton(h):
        counted = (targets != ignore_index).nonzero().squeeze(1)
        if len(counted) == len(targets):
            counted = None
    elif 0 <= max_counted < len(targets):
        ignored = (targets == ignore_index).to(torch.int8)
        counted = ignored.argsort(stable=True)[:max_counted]
    return Head(
        h=h if counted is None else h[counted],
        weight=weight.to(h.dtype),
        bias=None if bias is None else bias.to(h.dtype),
        targets=targets if counted is None else targets[counted],
        counted=counted,
        total=len(h),
    )


@dataclass(frozen=True)
class Gradients:
    """Of the chunks so far; where not needed, of shape (0,). dw and db are in fp32 (or fp64)."""

    dh: Tensor  # (n, D)
    dw: Tensor  # (V, D)
    db: Tensor  # (V,)

    @classmethod
    def of(cls, head: Head, need_dh: bool, need_dw: bool) -> Gradients:
        h = head.h
        acc = accumulation_dtype(h.dtype)
        # the first chunk writes dw, the others add to it
        make = torch.zeros if len(h) == 0 else torch.empty
        with_bias = need_dw and head.bias is not None
        return cls(
            dh=h.new_empty(h.shape if need_dh else (0,)),
            dw=make(head.weight.shape if need_dw else (0,), dtype=acc, device=h.device),
            db=torch.zeros(len(head.weight) if with_bias else 0, dtype=acc, device=h.device),
        )

    def add(self, head: Head, at: slice, dlogits: Tensor) -> None:
        """Those rows' parts of them, from the gradient of their logits."""
        if self.dh.dim() == 2:
            torch.mm(dlogits, head.weight, out=self.dh[at])
        if self.dw.dim() == 2:
            add_product(self.dw, dlogits.t(), head.h[at], first=at.start == 0)
        if self.db.numel():
            self.db.add_(dlogits.sum(0, dtype=self.db.dtype))

    def of_all_rows(self, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        """(dh (N, D), dW, dbias)."""
        dh = head.spread(self.dh) if self.dh.dim() == 2 else self.dh
        return dh, self.dw, self.db


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, or = at first; total is in fp32 (or fp64), and the product never below."""
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def chunks(head: Head, chunk_bytes: int) -> tuple[Iterator[slice], Tensor]:
    """The rows of each chunk, and room for the logits of one."""
    n = len(head.h)
    width = len(head.weight)
    size = rows_at_a_time(head.h, width, chunk_bytes)
    scratch = room(head.h, min(size, n), width)[:, :width]
    return (slice(start, min(start + size, n)) for start in range(0, n, size)), scratch


# ---------------------------------------------------------------- the loops


def loss_and_gradients(
    head: Head, options: LossOptions, chunk_bytes: int, need_dh: bool, need_dw: bool
) -> tuple[Tensor, Gradients]:
    """The loss of all N rows, and the gradients of their sum."""
    loss = head.h.new_empty(len(head.h), dtype=accumulation_dtype(head.h.dtype))
    lse = torch.empty_like(loss)
    gradients = Gradients.of(head, need_dh, need_dw)
    slices, scratch = chunks(head, chunk_bytes)
    for at in slices:
        logits = head.logits(at, out=scratch[: at.stop - at.start])
        dlogits = logits if need_dh or need_dw else None
        cross_entropy_rows(logits, head.targets[at], loss[at], lse[at], None, dlogits, options)
        gradients.add(head, at, logits)
    return head.spread(loss), gradients


def forward(
    head: Head, options: LossOptions, chunk_bytes: int, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, lse) of all N rows; kept: room for the first chunks' logits, which it fills."""
    loss = head.h.new_empty(len(head.h), dtype=accumulation_dtype(head.h.dtype))
    lse = torch.empty_like(loss)
    slices, scratch = chunks(head, chunk_bytes)
    for at in slices:
        keep = at.stop <= len(kept)
        out = kept[at, : len(head.weight)] if keep else scratch[: at.stop - at.start]
        logits = head.logits(at, out)
        cross_entropy_rows(logits, head.targets[at], loss[at], lse[at], None, None, options)
    return head.spread(loss), head.spread(lse)


def backward(
    head: Head,
    options: LossOptions,
    chunk_bytes: int,
    dloss: Tensor,
    lse: Tensor,
    kept: Tensor,
    gradients: Gradients,
) -> None:
    """Add to the gradients, from those of the rows' losses; lse and kept as forward() left them."""
    dloss = head.gather(dloss)
    lse = head.gather(lse)
    slices, scratch = chunks(head, chunk_bytes)
    for at in slices:
        dlogits = scratch[: at.stop - at.start]
        keep = at.stop <= len(kept)
        logits = kept[at, : len(head.weight)] if keep else head.logits(at, out=dlogits)
        cross_entropy_rows(logits, head.targets[at], None, lse[at], dloss[at], dlogits, options)
        gradients.add(head, at, dlogits)

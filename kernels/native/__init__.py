"""The bridge from tensors to the C++ kernels in this folder, and what is known about them on this machine.

The native module takes addresses; the functions here bring shapes, strides and dtypes into its form, allocate the
results and pass `torch.get_num_threads()`, so that the kernels run on torch's own OpenMP threads. `available` says
whether they may be called: where the module was not built (no C++ compiler at installation), and for other dtypes,
the ops use their PyTorch reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels.common import as_rows

try:
    from fastlm.kernels import _native  # type: ignore[attr-defined]  # compiled: mypy does not see it
except ImportError as error:
    _native, _why_not = None, str(error)
else:
    _why_not = ""

DTYPES = (torch.float32, torch.bfloat16)


def available(*tensors: Tensor) -> bool:
    """Whether the native kernels take these tensors: the module is built, and all are fp32 or all bf16."""
    dtype = tensors[0].dtype
    return _native is not None and dtype in DTYPES and all(t.dtype == dtype for t in tensors)


def status() -> str:
    """One line for `fastlm doctor`: whether the native module is built, its instruction set, its threads."""
    if _native is None:
        return f"PyTorch reference path: the native module is not built ({_why_not}); install again with a C++ compiler"
    threads = f"{torch.get_num_threads()} threads" if _native.openmp() else "1 thread (built without OpenMP)"
    return f"native, {_native.instruction_set()} (of {', '.join(_native.instruction_sets())}), {threads}"


def keep_large_blocks() -> bool:
    """Tell glibc to keep freed blocks of any size for reuse instead of returning their pages to the system.

    A training step frees and allocates the same blocks again and again; without this, each of them is unmapped, mapped
    and zeroed page by page every time. Acts on the whole process, for good: called once, by the command line. Returns
    whether it took effect; False where the C library is not glibc or the native module is not built.
    """
    return _native is not None and _native.keep_large_blocks()


def _common(x: Tensor) -> tuple[bool, int]:
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual, rstd) as rms_norm.py defines them; without a residual the sum is x itself."""
    bf16, threads = _common(x)
    rows, w = as_rows(x), weight.float().contiguous()
    add = None if residual is None else as_rows(residual)
    y, rstd = _empty(x, *x.shape), torch.empty(x.shape[:-1])
    total = x if add is None else torch.empty_like(y)
    _native.rms_norm(
        bf16, rows.data_ptr(), rows.stride(0), _address(add), 0 if add is None else add.stride(0), w.data_ptr(),
        total.data_ptr(), y.data_ptr(), rstd.data_ptr(), len(rows), w.numel(), eps, threads,
    )  # fmt: skip
    return y, total, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None, emit_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, y or nothing) as rms_norm.py defines them."""
    bf16, threads = _common(x)
    rows, dy, w, rstd = as_rows(x), as_rows(dy), weight.float().contiguous(), rstd.contiguous()
    add = None if dsum is None else as_rows(dsum)
    dx, dw = _empty(x, *x.shape), torch.empty(w.shape)
    y = _empty(x, *x.shape) if emit_y else None
    _native.rms_norm_backward(
        bf16, rows.data_ptr(), rows.stride(0), w.data_ptr(), rstd.data_ptr(), dy.data_ptr(), dy.stride(0),
        _address(add), 0 if add is None else add.stride(0), dx.data_ptr(), _address(y), dw.data_ptr(), len(rows),
        w.numel(), threads,
    )  # fmt: skip
    return dx, dw.to(weight.dtype), _empty(x, 0) if y is None else y


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
    """(q, k) rotated, as rope.py defines it. Raises IndexError for a position outside cos."""
    bf16, threads = _common(q)
    batch, tokens, _, head_dim = q.shape
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    at = None if positions is None else positions.long().contiguous()
    to_q, to_k = _empty(q, *q.shape), _empty(k, *k.shape)
    _native.rope(
        bf16, q.data_ptr(), q.stride()[:3], q.shape[2], to_q.data_ptr(), k.data_ptr(), k.stride()[:3], k.shape[2],
        to_k.data_ptr(), cos.data_ptr(), sin.data_ptr(), len(cos), _address(at), batch, tokens, head_dim // 2, inverse,
        threads,
    )  # fmt: skip
    return to_q, to_k


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, as swiglu.py defines it."""
    bf16, threads = _common(gate_up)
    rows, dim = as_rows(gate_up), gate_up.shape[-1] // 2
    y = _empty(gate_up, *gate_up.shape[:-1], dim)
    _native.swiglu(bf16, rows.data_ptr(), rows.stride(0), y.data_ptr(), len(rows), dim, threads)
    return y


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T (..., O) of a few rows x (..., D) and contiguous weight (O, D), as fast as the weight can be read."""
    bf16, threads = _common(x)
    rows = as_rows(x).contiguous()
    y = _empty(x, *x.shape[:-1], len(weight))
    _native.few_rows_linear(
        bf16, rows.data_ptr(), len(rows), weight.data_ptr(), weight.shape[1], y.data_ptr(), len(weight), threads
    )
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor, emit_y: bool) -> tuple[Tensor, Tensor]:
    """(dgate_up, y or nothing) as swiglu.py defines them."""
    bf16, threads = _common(gate_up)
    rows, dy, dim = as_rows(gate_up), as_rows(dy), gate_up.shape[-1] // 2
    grad = _empty(gate_up, *gate_up.shape)
    y = _empty(gate_up, *gate_up.shape[:-1], dim if emit_y else 0)
    _native.swiglu_backward(
        bf16, rows.data_ptr(), rows.stride(0), dy.data_ptr(), dy.stride(0), grad.data_ptr(),
        y.data_ptr() if emit_y else 0, len(rows), dim, threads,
    )  # fmt: skip
    return grad, y if emit_y else _empty(gate_up, 0)


def _heads(x: Tensor) -> Tensor:
    """x (N, H, Dh), each token's elements adjacent: x itself where they are."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _attention_inputs(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[list[Tensor], tuple]:
    """What must stay alive, and the arguments that both directions begin with."""
    q, k, v = alive = [_heads(x) for x in (q, k, v)]
    bounds = [cu.int().contiguous() for cu in (cu_q, cu_k)]
    ends = [(cu.data_ptr(), len(x)) for cu, x in zip(bounds, (q, k), strict=True)]
    tensors = [(x.data_ptr(), x.stride(0)) for x in alive]
    return alive + bounds, (*tensors, *ends, len(cu_q) - 1, q.shape[1], k.shape[1], q.shape[2])


def _for_tokens(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, cu: Tensor) -> Tensor:
    """To be filled for the tokens of x (N, ...) within the boundaries; 0 for others."""
    everywhere = len(cu) > 1 and cu[0] == 0 and cu[-1] == len(x)
    return (torch.empty if everywhere else torch.zeros)(shape, dtype=dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    """(out (N, H, Dh), lse (N, H) in fp32) of causal attention within segments: q (N, H, Dh), k, v (M, Hkv, Dh).

    Segment i: queries cu_q[i] to cu_q[i + 1], keys cu_k[i] to cu_k[i + 1]; its last query sees all of its keys, the one
    before it one less. Tokens of no segment get 0. Raises IndexError where boundaries fall, or pass N or M.
    """
    bf16, threads = _common(q)
    _alive, inputs = _attention_inputs(q, k, v, cu_q, cu_k)
    out, lse = _for_tokens(q, q.shape, q.dtype, cu_q), _for_tokens(q, q.shape[:2], torch.float32, cu_q)
    _native.attention(bf16, *inputs, out.data_ptr(), lse.data_ptr(), threads)
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of attention(), from its results."""
    bf16, threads = _common(q)
    _alive, inputs = _attention_inputs(q, k, v, cu_q, cu_k)
    dout, out, lse = _heads(dout), out.contiguous(), lse.contiguous()
    dq, dk, dv = (_for_tokens(x, x.shape, x.dtype, cu) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
    _native.attention_backward(
        bf16, *inputs, (dout.data_ptr(), dout.stride(0)), out.data_ptr(), lse.data_ptr(), dq.data_ptr(), dk.data_ptr(),
        dv.data_ptr(), threads,
    )  # fmt: skip
    return dq, dk, dv


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    dloss: Tensor | None,
    grad: Tensor | None,
    *options: float,
) -> None:
    """Fill loss and lse (n,) of logits (n, V), or read lse where loss is None; fill grad, or logits, times dloss.

    The columns of logits and grad are adjacent; loss and lse are contiguous fp32. options: ignore_index,
    z_loss, label_smoothing, softcap, vocab_size. The lse of an ignored row is 0.
    """
    bf16, threads = _common(logits)
    targets = targets.long().contiguous()
    dloss = None if dloss is None else dloss.float().contiguous()
    _native.cross_entropy(
        bf16, logits.data_ptr(), logits.stride(0), targets.data_ptr(), _address(loss), lse.data_ptr(), _address(dloss),
        _address(grad), 0 if grad is None else grad.stride(0), *logits.shape, *options, threads,
    )  # fmt: skip


def cross_entropy(logits: Tensor, targets: Tensor, *options: float) -> tuple[Tensor, Tensor]:
    """(loss, lse) of each row, as cross_entropy.py defines them."""
    rows = as_rows(logits)
    loss, lse = torch.empty(len(rows)), torch.empty(len(rows))
    cross_entropy_rows(rows, targets, loss, lse, None, None, *options)
    return loss, lse


def cross_entropy_backward(dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, *options: float) -> Tensor:
    """dlogits, as cross_entropy.py defines it."""
    rows, grad = as_rows(logits), _empty(logits, *logits.shape)
    cross_entropy_rows(rows, targets, None, lse.contiguous(), dloss, grad, *options)
    return grad

"""The bridge from tensors to the C++ kernels in this folder, and what is known about them here.

The native module takes addresses; the functions here bring shapes, strides and dtypes into its
form, allocate the results and pass `torch.get_num_threads()`, so that the kernels run on torch's
own OpenMP threads. `available` says whether they may be called: where the module was not built (no
C++ compiler at installation), and for other dtypes, the ops use their PyTorch reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.kernels.common import as_rows, takes_triton
from fastlm.kernels.loss_options import LossOptions

try:
    from fastlm.kernels import _native  # type: ignore[attr-defined]  # compiled: mypy is blind to it
except ImportError as error:
    _native, _why_not = None, str(error)
else:
    _why_not = ""

DTYPES = (torch.float32, torch.bfloat16)


def available(*tensors: Tensor) -> bool:
    """Whether the native kernels take these tensors: all fp32 or all bf16, the module built."""
    dtype = tensors[0].dtype
    return _native is not None and dtype in DTYPES and all(t.dtype == dtype for t in tensors)


def inference() -> bool:
    """Whether there is neither autograd nor a compiler to think of."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def direct(x: Tensor) -> bool:
    """Whether an op may call its C++ kernel itself, past PyTorch's dispatcher.

    In inference mode, on a CPU: there is no autograd then. Of a written token of SmolLM2-135M the
    dispatcher would take a tenth.
    """
    ours = _native is not None and x.dtype in DTYPES
    return ours and inference() and not takes_triton(x)


def status() -> str:
    """One line for `fastlm doctor`: is the module built, its instruction set, its threads."""
    if _native is None:
        why = f"the native module is not built ({_why_not}); install again with a C++ compiler"
        return f"PyTorch reference path: {why}"
    threads = f"{torch.get_num_threads()} threads"
    if not _native.openmp():
        threads = "1 thread (built without OpenMP)"
    sets = ", ".join(_native.instruction_sets())
    return f"native, {_native.instruction_set()} (of {sets}), {threads}"


def keep_large_blocks() -> bool:
    """Tell glibc to keep freed blocks of any size for reuse.

    A training step frees and allocates the same blocks again and again; without this, their pages
    go back to the system, and each block is unmapped, mapped and zeroed page by page every time.
    Acts on the whole process, for good: called once, by the command line. Returns whether it took
    effect; False where the C library is not glibc or the native module is not built.
    """
    return _native is not None and _native.keep_large_blocks()


def _common(x: Tensor) -> tuple[bool, int]:
    """What every kernel takes: whether x is bf16 (otherwise fp32), and the number of threads."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x + residual, rstd) as rms_norm.py defines them; without residual the sum is x itself."""
    bf16, threads = _common(x)
    rows = as_rows(x)
    w = weight.float().contiguous()
    add = None if residual is None else as_rows(residual)
    shape = x.shape
    y = torch.empty(shape, dtype=x.dtype)
    rstd = torch.empty(shape[:-1])
    total = x if add is None else torch.empty(shape, dtype=x.dtype)
    _native.rms_norm(
        bf16,
        rows.data_ptr(),
        rows.stride(0),
        _address(add),
        0 if add is None else add.stride(0),
        w.data_ptr(),
        total.data_ptr(),
        y.data_ptr(),
        rstd.data_ptr(),
        len(rows),
        w.numel(),
        eps,
        threads,
    )
    return y, total, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dx, dw) as rms_norm.py defines them."""
    bf16, threads = _common(x)
    rows = as_rows(x)
    dy = as_rows(dy)
    w = weight.float().contiguous()
    rstd = rstd.contiguous()
    add = None if dsum is None else as_rows(dsum)
    dx = _empty(x, *x.shape)
    dw = torch.empty(w.shape)
    _native.rms_norm_backward(
        bf16,
        rows.data_ptr(),
        rows.stride(0),
        w.data_ptr(),
        rstd.data_ptr(),
        dy.data_ptr(),
        dy.stride(0),
        _address(add),
        0 if add is None else add.stride(0),
        dx.data_ptr(),
        dw.data_ptr(),
        len(rows),
        w.numel(),
        threads,
    )
    return dx, dw.to(weight.dtype)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """(q, k) rotated, as rope.py defines it. Raises IndexError for a position outside cos."""
    bf16, threads = _common(q)
    batch, tokens, _, head_dim = q.shape
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    cos = cos.contiguous()
    sin = sin.contiguous()
    at = None if positions is None else positions.long().contiguous()
    to_q = _empty(q, *q.shape)
    to_k = _empty(k, *k.shape)
    _native.rope(
        bf16,
        q.data_ptr(),
        q.stride()[:3],
        q.shape[2],
        to_q.data_ptr(),
        k.data_ptr(),
        k.stride()[:3],
        k.shape[2],
        to_k.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        len(cos),
        _address(at),
        batch,
        tokens,
        head_dim // 2,
        inverse,
        threads,
    )
    return to_q, to_k


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, as swiglu.py defines it."""
    bf16, threads = _common(gate_up)
    rows = as_rows(gate_up)
    dim = gate_up.shape[-1] // 2
    y = _empty(gate_up, *gate_up.shape[:-1], dim)
    _native.swiglu(bf16, rows.data_ptr(), rows.stride(0), y.data_ptr(), len(rows), dim, threads)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor, emit_y: bool) -> tuple[Tensor, Tensor]:
    """(dgate_up, y or nothing) as swiglu.py defines them."""
    bf16, threads = _common(gate_up)
    rows = as_rows(gate_up)
    dy = as_rows(dy)
    dim = gate_up.shape[-1] // 2
    dgate_up = _empty(gate_up, *gate_up.shape)
    y = _empty(gate_up, *gate_up.shape[:-1], dim if emit_y else 0)
    _native.swiglu_backward(
        bf16,
        rows.data_ptr(),
        rows.stride(0),
        dy.data_ptr(),
        dy.stride(0),
        dgate_up.data_ptr(),
        y.data_ptr() if emit_y else 0,
        len(rows),
        dim,
        threads,
    )
    return dgate_up, y if emit_y else _empty(gate_up, 0)


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    options: LossOptions,
) -> None:
    """As cross_entropy.py defines it; loss and lse are contiguous fp32."""
    bf16, threads = _common(logits)
    targets = targets.long().contiguous()
    upstream = None if dloss is None else dloss.float().contiguous()
    _native.cross_entropy(
        bf16,
        logits.data_ptr(),
        logits.stride(0),
        targets.data_ptr(),
        _address(loss),
        lse.data_ptr(),
        _address(upstream),
        _address(dlogits),
        0 if dlogits is None else dlogits.stride(0),
        *logits.shape,
        options.ignore_index,
        options.z_loss,
        options.label_smoothing,
        options.softcap,
        options.columns(logits.shape[1]),
        threads,
    )


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T (..., O) of few rows x (..., D), weight (O, D) contiguous, read only once."""
    bf16, threads = _common(x)
    x = x.contiguous()
    out, dim = weight.shape
    y = torch.empty((*x.shape[:-1], out), dtype=x.dtype)
    rows = x.numel() // dim
    _native.few_rows_linear(
        bf16, x.data_ptr(), rows, weight.data_ptr(), dim, y.data_ptr(), out, threads
    )
    return y


def _heads(x: Tensor) -> Tensor:
    """x (N, H, Dh), each token's elements adjacent: x itself where they are."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _attention_inputs(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[list[Tensor], tuple]:
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
    """(out, lse) as packed_documents.py defines them.

    Tokens of no segment get 0. Raises IndexError where boundaries fall, or pass N or M.
    """
    bf16, threads = _common(q)
    _alive, inputs = _attention_inputs(q, k, v, cu_q, cu_k)
    out = _for_tokens(q, q.shape, q.dtype, cu_q)
    lse = _for_tokens(q, q.shape[:2], torch.float32, cu_q)
    _native.attention(bf16, *inputs, out.data_ptr(), lse.data_ptr(), threads)
    return out, lse


# Eight parameters: the backward of an op takes its inputs, its results and their gradient.
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of attention(), from its results."""
    bf16, threads = _common(q)
    _alive, inputs = _attention_inputs(q, k, v, cu_q, cu_k)
    dout = _heads(dout)
    out = out.contiguous()
    lse = lse.contiguous()
    dq = _for_tokens(q, q.shape, q.dtype, cu_q)
    dk = _for_tokens(k, k.shape, k.dtype, cu_k)
    dv = _for_tokens(v, v.shape, v.dtype, cu_k)
    _native.attention_backward(
        bf16,
        *inputs,
        (dout.data_ptr(), dout.stride(0)),
        out.data_ptr(),
        lse.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        threads,
    )
    return dq, dk, dv

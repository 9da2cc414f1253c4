"""The bridge from tensors to the native CPU kernels (kernels/native), and what is known about them on this machine.

The native module takes addresses; the functions here check dtypes, shapes and strides, allocate the results and pass
`torch.get_num_threads()`, so that the kernels run on torch's own OpenMP threads. Where the module was not built (no
C++ compiler at installation) `available` is false for every tensor, and the ops use their PyTorch reference.
"""

import torch
from torch import Tensor

try:
    from fastlm.kernels import _native
except ImportError as error:
    _native, _why_not = None, str(error)
else:
    _why_not = ""

DTYPES = (torch.float32, torch.bfloat16)


def available(*tensors: Tensor) -> bool:
    """Whether the native kernels take these tensors: the module is built, all on the CPU, all fp32 or all bf16."""
    dtype = tensors[0].dtype
    return (
        _native is not None and dtype in DTYPES and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
    )


def status() -> str:
    """One line for `fastlm doctor`: whether the native module is built, its instruction set, its threads."""
    if _native is None:
        return f"not built ({_why_not}): PyTorch reference path; install again with a C++ compiler to get it"
    threads = f"{torch.get_num_threads()} threads" if _native.openmp() else "1 thread (built without OpenMP)"
    return f"native, {_native.instruction_set()} of {', '.join(_native.instruction_sets())}, {threads}"


def keep_large_blocks() -> bool:
    """Tell glibc to keep freed blocks of any size for reuse instead of returning their pages to the system.

    A training step frees and allocates the same blocks again and again; without this, each of them is unmapped, mapped
    and zeroed page by page every time. Acts on the whole process, for good: called once, by the command line. Returns
    whether it took effect; False where the C library is not glibc or the native module is not built.
    """
    return _native is not None and _native.keep_large_blocks()


def _rows(x: Tensor, dim: int) -> tuple[Tensor, int]:
    """x as (rows, dim) with adjacent elements within a row, and its row stride; copies only where it must."""
    x = x.reshape(-1, dim)
    if x.stride(1) != 1 and dim > 1:
        x = x.contiguous()
    return x, x.stride(0)


def rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x * rstd * w over the last dimension: y like x (contiguous) and rstd, fp32, one per row."""
    rows, stride = _rows(x, w.numel())
    y = torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    _native.rms_norm(
        x.dtype == torch.bfloat16, rows.data_ptr(), stride, 0, 0, w.contiguous().data_ptr(), 0, y.data_ptr(),
        rstd.data_ptr(), rows.shape[0], w.numel(), eps, torch.get_num_threads(),
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx like x (contiguous) and dw like w; dy may have any strides."""
    rows, stride = _rows(x, w.numel())
    dy_rows, dy_stride = _rows(dy, w.numel())
    dx, dw = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(w)
    blocks = max(1, min(64, rows.shape[0]))
    partial = torch.empty(blocks, w.numel())
    _native.rms_norm_backward(
        x.dtype == torch.bfloat16, rows.data_ptr(), stride, w.contiguous().data_ptr(), rstd.data_ptr(),
        dy_rows.data_ptr(), dy_stride, 0, 0, dx.data_ptr(), partial.data_ptr(), dw.data_ptr(), rows.shape[0],
        w.numel(), blocks, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dw

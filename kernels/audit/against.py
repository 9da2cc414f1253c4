"""Liger-Kernel's launches as cases like our own, for `fastlm kernels --against liger`.

Needs the package liger-kernel. Each does what our case of the same name does where Liger has it:
its cross-entropy computes loss and gradient in one kernel over the logits in place, its RoPE works
in place on separate q and k. On a machine without a GPU its norm's backward runs as one program.
"""

from __future__ import annotations

import torch

from fastlm.kernels.audit.configurations import SEQUENCES, Case, Make

BULK = (
    "X_ptr",
    "Y_ptr",
    "R_ptr",
    "S_ptr",
    "dY_ptr",
    "dX_ptr",
    "dS_out_ptr",
    "q_ptr",
    "k_ptr",
    "y_ptr",
    "c_ptr",
    "dc_ptr",
    "dy_ptr",
)


def liger_cases(dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Liger's kernels at modern-253m's widths.

    Raises ImportError where liger-kernel is not installed.
    """
    from liger_kernel.ops import cross_entropy, fused_add_rms_norm, rms_norm, rope, swiglu

    size = dtype.itemsize
    d = 1024
    f = 4096
    v = 50257

    def norm_forward(make: Make, rows: int) -> object:
        x = make(rows, d, dtype=dtype)
        return rms_norm.rms_norm_forward(x, make(d, dtype=dtype), 1e-5, 0.0, "llama", None)

    def norm_backward(make: Make, rows: int) -> object:
        dy, x = (make(rows, d, dtype=dtype) for _ in range(2))
        w = make(d, dtype=dtype)
        rstd = make(rows, dtype=torch.float32)
        block, warps = rms_norm.calculate_settings(d)
        return rms_norm.rms_norm_backward(dy, x, w, rstd, 0.0, 0, block, warps, False, None)

    def add_forward(make: Make, rows: int) -> object:
        x, r = (make(rows, d, dtype=dtype) for _ in range(2))
        w = make(d, dtype=dtype)
        return fused_add_rms_norm.fused_add_rms_norm_forward(x, r, w, 1e-5, 0.0, "llama")

    def rope_forward(make: Make, rows: int) -> object:
        q, k = (make(1, rows, 16, 64, dtype=dtype).transpose(1, 2) for _ in range(2))
        cos, sin = (make(1, rows, 64, dtype=dtype) for _ in range(2))
        return rope.rope_forward(q, k, cos, sin)

    def swiglu_forward(make: Make, rows: int) -> object:
        return swiglu.swiglu_fused_gate_up_forward(make(rows, 2 * f, dtype=dtype))

    def swiglu_backward(make: Make, rows: int) -> object:
        gate_up = make(rows, 2 * f, dtype=dtype)
        return swiglu.swiglu_fused_gate_up_backward(gate_up, make(rows, f, dtype=dtype))

    def entropy(make: Make, rows: int) -> object:
        logits = make(rows, v, dtype=dtype).requires_grad_()
        targets = make(rows, dtype=torch.int64)
        with torch.no_grad():
            return cross_entropy.cross_entropy_forward(
                logits, targets, None, -100, 0.0, 0.0, "mean", None, False
            )

    floors = [
        ("rms_norm", "forward", d, 2 * d * size + 4, norm_forward),
        ("rms_norm", "backward", d, 3 * d * size + 4, norm_backward),
        ("add_rms_norm", "forward", d, 4 * d * size + 4, add_forward),
        ("rope", "forward", d, 4 * d * size + 128 // SEQUENCES, rope_forward),
        ("swiglu", "forward", f, 3 * f * size, swiglu_forward),
        ("swiglu", "backward", f, 5 * f * size, swiglu_backward),
        ("linear_cross_entropy", "in place", v, 3 * v * size + 16, entropy),
    ]
    return [
        Case(op, direction, width, dtype, BULK, floor, launch)
        for op, direction, width, floor, launch in floors
    ]

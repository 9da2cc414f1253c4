"""The ops as a list, and their Triton path on CPU tensors: for the tests, the interpreter, simulators and `fastlm kernels`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastlm.kernels.cross_entropy import _cross_entropy, _cross_entropy_backward
from fastlm.kernels.linear_cross_entropy import _linear_cross_entropy, _linear_nll, _linear_nll_backward
from fastlm.kernels.rms_norm import _add_rms_norm, _rms_norm, _rms_norm_backward
from fastlm.kernels.rope import _rope
from fastlm.kernels.swiglu import _swiglu, _swiglu_backward

OPS = (
    _rms_norm,
    _add_rms_norm,
    _rms_norm_backward,
    _rope,
    _swiglu,
    _swiglu_backward,
    _cross_entropy,
    _cross_entropy_backward,
    _linear_cross_entropy,
    _linear_nll,
    _linear_nll_backward,
)


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Inside, CPU tensors take the Triton path: something else must stand in for the GPU, such as Triton's interpreter."""
    with contextlib.ExitStack() as stack:
        for op in OPS:
            stack.enter_context(op.set_kernel_enabled("cpu", enabled=False))
        yield

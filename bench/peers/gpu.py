"""Peers of the GPU benchmarks, each built when its package is there, else why it is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = tuple[list[Tensor], list[Tensor]]  # those that get a gradient, those that get none


def absent(package: str, module: str) -> str:
    """Why the peer is missing, or nothing."""
    return "" if importlib.util.find_spec(module) else f"{package} is not installed"


def liger(op: str, given: Inputs) -> tuple[Callable, Inputs]:
    """Liger-Kernel's function for one of our operations, and the inputs as it wants them."""
    from liger_kernel import ops

    def rms_norm(x, w):
        return ops.LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "llama", False)

    def add_rms_norm(x, r, w):
        return ops.LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-5, 0.0, "llama", False)

    def swiglu(gate_up):
        return ops.LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))

    def rope(q, k, cos, sin):
        q, k = ops.LigerRopeFunction.apply(
            q.transpose(1, 2), k.transpose(1, 2), cos, sin
        )  # it works on (1, H, T, Dh)
        return q.transpose(1, 2), k.transpose(1, 2)

    def cross_entropy(
        logits, targets
    ):  # where the logits get a gradient, it overwrites them by it in the forward
        return ops.LigerCrossEntropyFunction.apply(logits, targets, None)[0]

    if op == "rope":
        given = (
            given[0],
            [torch.cat((t, t), -1).unsqueeze(0).to(given[0][0].dtype) for t in given[1]],
        )
    return {f.__name__: f for f in (rms_norm, add_rms_norm, swiglu, rope, cross_entropy)}[op], given


def plain_head(h, weight, targets):
    return F.cross_entropy((h @ weight.t()).float(), targets)


def liger_head(h, weight, targets):
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(h, weight, targets)[0]


def cut_head(h, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, weight, targets)


def torch_head(h, weight, targets):
    return F.linear_cross_entropy(h, weight, targets)


def torch_head_in_chunks(h, weight, targets):
    return F.linear_cross_entropy(h, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def plain_logprobs(h, weight, targets):
    return (h @ weight.t()).float().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def heads() -> dict[str, tuple[Callable, str]]:
    """name -> (loss of (h, weight, targets), why it is missing or "")."""
    old = f"torch {torch.__version__} has no linear_cross_entropy"
    has_head = hasattr(F, "linear_cross_entropy")
    has_chunks = hasattr(torch.nn, "LinearCrossEntropyOptions")
    return {
        "eager": (plain_head, ""),
        "torch linear_cross_entropy": (torch_head, "" if has_head else old),
        "torch linear_cross_entropy in chunks": (
            torch_head_in_chunks,
            "" if has_chunks else f"{old} in chunks",
        ),
        "liger": (liger_head, absent("liger-kernel", "liger_kernel")),
        "cut-cross-entropy": (cut_head, absent("cut-cross-entropy", "cut_cross_entropy")),
    }

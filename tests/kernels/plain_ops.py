"""The operations in plain PyTorch, as the tests mean them.

In float64 the truth, in the kernels' dtype their measure.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of the norms
LENGTH = 40  # positions of rotary_table()

LOSS_OPTIONS = [
    dict(
        zip(
            ("reduction", "z_loss", "label_smoothing", "softcap", "vocab_size"), values, strict=True
        )
    )
    for values in itertools.product(
        ("mean", "sum", "none"), (0.0, 0.01), (0.0, 0.2), (0.0, 5.0), (None, 30)
    )
]


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w.to(x.dtype), EPS)


def rms_norm_in_fp32(x: Tensor, w: Tensor) -> Tensor:
    """Same-dtype PyTorch for a weight of another dtype: everything in fp32, rounded once."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(acc), x.shape[-1:], w.to(acc), EPS).to(x.dtype)


def add_rms_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = x + r
    return rms_norm_in_fp32(s, w), s


def rotary_table(width: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin (LENGTH, width / 2)."""
    inverse = 10000.0 ** -(torch.arange(0, width, 2, device=device).double() / width)
    angles = torch.outer(torch.arange(LENGTH, device=device).double(), inverse)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1 + i x2) (cos + i sin), the halves of a head as real and imaginary parts."""
    acc = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(acc).chunk(2, -1)
    cos, sin = cos.to(acc).unsqueeze(-2), sin.to(acc).unsqueeze(-2)
    turned = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


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
    """PyTorch's own cross-entropy, with a z-loss and a soft cap, in at least fp32."""
    z = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    rows = F.cross_entropy(
        z, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    rows = rows + z_loss * torch.where(targets == ignore_index, 0, torch.logsumexp(z, -1).square())
    if reduction == "none":
        return rows
    return rows.sum() / (
        max(1, (targets != ignore_index).sum().item()) if reduction == "mean" else 1
    )

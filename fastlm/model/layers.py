"""What blocks are made of: modules whose forward is one fused operation.

Each owns its forward, so a module put in its place (LoRA, a quantised weight) or a hook on it takes
part in training and in generation alike. Weights keep their own dtype, and activations take the
dtype of autocast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastlm import kernels


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension: (..., D) to (..., D)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class AddRMSNorm(nn.Module):
    """(RMSNorm(x + update), x + update) in one pass; (..., D) each."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, update: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """x is None where the residual stream begins: the sum is then update itself."""
        if x is None:
            return kernels.rms_norm(update, self.weight, self.eps), update
        return kernels.add_rms_norm(update, x, self.weight, self.eps)


class Linear(nn.Linear):
    """z = x W^T + b: x (..., D), W (O, D), b (O,) or None; z (..., O)."""

    def forward(self, x: Tensor) -> Tensor:
        z = kernels.linear(x, self.weight)
        return z if self.bias is None else z + self.bias.to(z.dtype)


class SplitLinear(nn.Module):
    """Linear layers of one input as one matrix: z_i = x W_i^T + b_i, the W_i below each other.

    x (..., D); returns a z_i (..., sizes[i]) for each of the sizes.
    """

    def __init__(self, in_features: int, sizes: Sequence[int], bias: bool = False):
        super().__init__()
        self.sizes = list(sizes)
        self.weight = nn.Parameter(torch.empty(sum(sizes), in_features))
        self.bias = nn.Parameter(torch.empty(sum(sizes))) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = kernels.linear(x, self.weight, self.sizes)
        if self.bias is None:
            return parts
        biases = self.bias.split(self.sizes)
        return tuple(z + b.to(z.dtype) for z, b in zip(parts, biases, strict=True))


class SwiGLULinear(nn.Module):
    """z = (silu(gate) * up) W^T: gate_up (..., 2F), gate first, W (D, F); z (..., D).

    One module, because the backward pass then makes the product again instead of keeping it.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.keep_product = False  # save the product for the backward pass: keep_what_fits()

    def forward(self, gate_up: Tensor) -> Tensor:
        return kernels.swiglu_linear(gate_up, self.weight, self.keep_product)

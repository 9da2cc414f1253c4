"""FLOPs of the ops that are matmuls, for torch.utils.flop_counter: to be imported where something is counted.

The package itself does not import it, because flop_counter imports Triton.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from fastlm.kernels import fused_linear  # noqa: F401  (it defines the ops)


@register_flop_formula([torch.ops.fastlm.input_gradient, torch.ops.fastlm.weight_gradient])
def _flops(dz_shapes, other_shape, *_, **__) -> int:
    return sum(2 * m * o * other_shape[1] for m, o in dz_shapes)

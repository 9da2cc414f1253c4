"""FLOPs of the operators that are matmuls, for torch.utils.flop_counter.

To be imported where something is counted. The package itself does not import it, because
flop_counter imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fastlm.kernels.linear import linear  # noqa: F401  (its module defines the operators)


@register_flop_formula([torch.ops.fastlm.input_gradient, torch.ops.fastlm.weight_gradient])
def _flops(dz_shapes: list[Any], other_shape: Any, *_: Any, **__: Any) -> int:
    return sum(2 * m * o * other_shape[1] for m, o in dz_shapes)

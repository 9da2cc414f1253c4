"""The log-probability of each target behind the head's matmul: DPO's gather, no (N, V) logits.

    logp_i = z_t - log sum_j exp z_j,  z = h_i W^T (+ bias), t the target of row i; 0 where ignored
    dlogits = upstream_i ([j = t] - p_j)          dh = dlogits W          dW = dlogits^T h

It is the negated loss of linear_cross_entropy.py with one upstream gradient per row, on the same
chunks: the forward keeps the log-sum-exp (fp32, one per row), the backward makes each chunk's
logits again, 4 matmuls in all; keep_bytes of logits are kept instead of made again, on a CPU, where
matmuls are dear and memory is not, 256 MiB unless it says otherwise.
Source: Rafailov et al., Direct Preference Optimization, 2023, equation 7.
"""

from __future__ import annotations

from torch import Tensor

from fastlm.kernels.linear_cross_entropy import Limits, head_loss
from fastlm.kernels.loss_options import LossOptions


# Ten parameters: the options are what users write.
def linear_logprobs(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    max_counted: int | None = None,
    keep_bytes: int | None = None,
) -> Tensor:
    """log p(target) = z_t - log sum exp z of each row in nats, z = h W^T + bias.

    Without ever holding the (N, V) logits. h (N, D), weight (V, D), bias (V,), targets (N,)
    integers; columns from vocab_size on are padding. Returns (N,) fp32 whatever autocast says, 0
    where the target is ignored and NaN where it is out of range. chunk_bytes, max_counted and
    keep_bytes as in linear_cross_entropy. Raises ValueError on shapes or options that do not fit.
    Source: Rafailov et al. 2023.
    """
    options = LossOptions(ignore_index, softcap=softcap, vocab_size=vocab_size)
    limits = Limits(chunk_bytes, max_counted, keep_bytes)
    return -head_loss("linear_logprobs", h, weight, bias, targets, options, "none", limits)

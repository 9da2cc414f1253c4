"""The angles of rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlm.config import ModelConfig


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos, sin (max_seq_len, Dh / 2), fp32, of position * f_i, f_i = theta^(-2i / Dh).

    RoFormer (Su et al. 2021), equation 15. Scaled models: linear divides every f_i by rope_factor;
    llama3 only those whose wavelength 2 pi / f_i is longer than rope_original_len /
    rope_low_freq_factor, none shorter than rope_original_len / rope_high_freq_factor, and blends
    the two in between (the Llama 3.1 reference code, apply_scaling). Frequencies and angles are
    rounded to fp32, as in the code that published models were trained with: at position 1000 an
    angle is then off by up to 6e-5.
    """
    c = config
    exponents = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
    frequency = 1 / c.rope_theta**exponents
    if c.rope_scaling == "linear":
        frequency = frequency / c.rope_factor
    elif c.rope_scaling == "llama3":
        turns = c.rope_original_len * frequency / (2 * torch.pi)  # in the original context
        span = c.rope_high_freq_factor - c.rope_low_freq_factor
        kept = ((turns - c.rope_low_freq_factor) / span).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / c.rope_factor)
    angles = torch.outer(torch.arange(c.max_seq_len, dtype=torch.float32), frequency)
    return angles.cos(), angles.sin()

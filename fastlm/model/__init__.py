"""A Llama-style decoder: layers, block, transformer; its first weights, and what it costs."""

from fastlm.model.block import Block, Layout
from fastlm.model.counts import count_parameters, training_flops_per_token
from fastlm.model.initialisation import Initialiser, build, initialise
from fastlm.model.layers import AddRMSNorm, Linear, RMSNorm, SplitLinear, SwiGLULinear
from fastlm.model.memory import keep_what_fits
from fastlm.model.transformer import Packed, Transformer

__all__ = [
    "AddRMSNorm",
    "Block",
    "Initialiser",
    "Layout",
    "Linear",
    "Packed",
    "RMSNorm",
    "SplitLinear",
    "SwiGLULinear",
    "Transformer",
    "build",
    "count_parameters",
    "initialise",
    "keep_what_fits",
    "training_flops_per_token",
]

"""The fused operations: RMSNorm, RoPE, SwiGLU, cross-entropy and the log-prob gather, each with its plain reference."""

from fastlm.kernels.attention import attention
from fastlm.kernels.cross_entropy import cross_entropy
from fastlm.kernels.embedding import embedding, tied_embedding
from fastlm.kernels.fused_linear import add_rms_norm_linear, linear, rms_norm_linear, swiglu_linear
from fastlm.kernels.linear_cross_entropy import linear_cross_entropy
from fastlm.kernels.logprobs import linear_logprobs
from fastlm.kernels.rms_norm import add_rms_norm, rms_norm
from fastlm.kernels.rope import rope
from fastlm.kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "add_rms_norm_linear",
    "attention",
    "cross_entropy",
    "embedding",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "rms_norm",
    "rms_norm_linear",
    "rope",
    "swiglu",
    "swiglu_linear",
    "tied_embedding",
]

"""The fused operations: each with its formula, its plain PyTorch reference and its kernels.

A public function has the name of its module, and hides it: `fastlm.kernels.rope` is the function.
What else a module has is imported by name (`from fastlm.kernels.rope import rope_reference`). The
modules that are needed as such, with launches or the bridge to C++ in them, lie where no function
has their name: `fastlm.kernels.triton`, `fastlm.kernels.native`.
"""

from fastlm.kernels.attention import attention
from fastlm.kernels.cross_entropy import cross_entropy
from fastlm.kernels.embedding import embedding, tied_embedding
from fastlm.kernels.linear import linear, swiglu_linear
from fastlm.kernels.linear_cross_entropy import linear_cross_entropy
from fastlm.kernels.logprobs import linear_logprobs
from fastlm.kernels.rms_norm import add_rms_norm, rms_norm
from fastlm.kernels.rope import rope
from fastlm.kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "embedding",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "rms_norm",
    "rope",
    "swiglu",
    "swiglu_linear",
    "tied_embedding",
]

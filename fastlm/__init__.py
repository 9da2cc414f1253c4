"""fastlm: train, align and evaluate small Llama-style language models, fast.

    import fastlm
    from fastlm.kernels import linear_cross_entropy

    model = fastlm.load("runs/pretrain-demo")
    print(model.generate("def main("), model.perplexity(TEXT))

`import fastlm` imports nothing heavy: torch comes with the first name that needs it.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # as typing has it, whose import would take most of fastlm's own
if TYPE_CHECKING:
    from typing import Any

    from fastlm import kernels
    from fastlm.config import ModelConfig
    from fastlm.language_model import load
    from fastlm.model import Transformer

__version__ = "0.1.0"
__all__ = ["ModelConfig", "Transformer", "kernels", "load"]

MODULES = {
    "ModelConfig": "fastlm.config",
    "Transformer": "fastlm.model",
    "load": "fastlm.language_model",
}


def __getattr__(name: str) -> Any:
    """Called for a name that is not here yet: the public ones are imported when first used."""
    if name == "kernels":
        return importlib.import_module("fastlm.kernels")
    if name in MODULES:
        return getattr(importlib.import_module(MODULES[name]), name)
    raise AttributeError(f"module 'fastlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

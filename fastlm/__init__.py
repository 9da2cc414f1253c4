"""fastlm: train, align and evaluate small Llama-style language models, fast."""

__version__ = "0.1.0"

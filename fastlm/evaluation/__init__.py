"""Perplexity of any model by four protocols, and lm-eval's tasks."""

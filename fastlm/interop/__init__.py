"""Hugging Face folders in and out, and any model by its name or path."""

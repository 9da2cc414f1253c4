"""Perplexity protocols and their report."""

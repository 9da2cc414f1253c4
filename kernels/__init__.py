"""The fused operations: RMSNorm, RoPE, SwiGLU, cross-entropy and the log-prob gather, each beside its plain PyTorch reference."""

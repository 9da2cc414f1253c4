"""Contenders that need a process of their own.

    python -m bench.peers.contenders NAME full|small

Then one turn per line of stdin. A process of its own gives each its own peak memory and its own
allocator settings: fastlm keeps large blocks, as its command line does; the others run as their
users run them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.peers.language_models import LANGUAGE_MODELS
from fastlm.runtime import process_peak_gib

SHAPE = {"full": (50257, 384, 6, 6, 1024, 8, 256), "small": (512, 64, 2, 4, 128, 2, 32)}
BACKEND = {"full": "inductor", "small": "eager"}  # the smoke test leaves the code generation out
HEAD = {"full": (4096, 384, 50257), "small": (64, 32, 512)}


def training_step(
    model: torch.nn.Module, optimizer, loss: Callable[[], torch.Tensor]
) -> Callable[[], None]:
    """A training step of any contender: backward, clip, fused AdamW."""

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def tokens(size: str) -> torch.Tensor:
    vocab, *_, batch, length = SHAPE[size]
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def ours(size: str, compiled: bool) -> Callable[[], None]:
    from fastlm.config import ModelConfig, OptimConfig
    from fastlm.kernels.native import keep_large_blocks
    from fastlm.model import build
    from fastlm.train.optim import make_optimizers

    keep_large_blocks()
    vocab, dim, layers, heads, ffn, batch, length = SHAPE[size]
    config = ModelConfig(
        vocab_size=vocab,
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        ffn_dim=ffn,
        max_seq_len=length,
    )
    model, x = build(config, 0, torch.device("cpu")), tokens(size)
    y = x.roll(-1, 1)
    y[:, -1] = -100
    loss = (
        torch.compile(model.loss, fullgraph=True, dynamic=False, backend=BACKEND[size])
        if compiled
        else model.loss
    )
    (adamw,) = make_optimizers(model, OptimConfig(name="adamw"))
    return training_step(model, adamw, lambda: loss(x, y) / (batch * (length - 1)))


def hugging_face(size: str, compiled: bool) -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab, dim, layers, heads, ffn, _, length = SHAPE[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model, x = LlamaForCausalLM(config), tokens(size)
    forward = torch.compile(model) if compiled and size == "full" else model
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    return training_step(model, adamw, lambda: forward(input_ids=x, labels=x).loss)


def head(size: str, loss: Callable) -> Callable[[], None]:
    """Forward and backward of the loss behind the head's matmul."""
    rows, dim, vocab = HEAD[size]
    h, w = (
        torch.randn(rows, dim, requires_grad=True),
        torch.randn(vocab, dim).mul_(0.02).requires_grad_(),
    )
    targets = torch.randint(vocab, (rows,))
    h.grad, w.grad = (
        torch.ones_like(h),
        torch.ones_like(w),
    )  # a training step needs these whatever the loss

    def turn() -> None:
        loss(h, w, targets).backward()
        h.grad.zero_()
        w.grad.zero_()

    return turn


def our_head(size: str) -> Callable[[], None]:
    from fastlm.kernels import linear_cross_entropy
    from fastlm.kernels.native import keep_large_blocks

    keep_large_blocks()
    return head(size, linear_cross_entropy)


def matmul(size: str) -> Callable[[], None]:
    """2 * 2048^3 floating-point operations: the rate that the bound is made of."""
    n = 2048 if size == "full" else 64
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return lambda: torch.mm(a, b, out=c)


CONTENDERS: dict[str, Callable[[str], Callable[[], None]]] = {
    "ours eager": lambda size: ours(size, False),
    "ours compiled": lambda size: ours(size, True),
    "hugging face eager": lambda size: hugging_face(size, False),
    "hugging face compiled": lambda size: hugging_face(size, True),
    "our head": our_head,
    "torch head": lambda size: head(size, F.linear_cross_entropy),
    "plain head": lambda size: head(size, lambda h, w, t: F.cross_entropy(h @ w.t(), t)),
    "matmul": matmul,
    **LANGUAGE_MODELS,
}


def main() -> None:
    torch.manual_seed(0)
    turn = CONTENDERS[sys.argv[1]](sys.argv[2])
    print(json.dumps({"peak_gib": process_peak_gib()}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        turn()
        print(
            json.dumps({"seconds": time.perf_counter() - start, "peak_gib": process_peak_gib()}),
            flush=True,
        )


if __name__ == "__main__":
    main()

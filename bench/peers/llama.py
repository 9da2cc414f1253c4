"""Hugging Face's Llama of the same shape, as its user trains it: compiled, bf16, fused AdamW."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch

from bench.harness.gpu_stage import CACHE, Enough, Seen, Size, on_this_machine, watched_steps
from bench.harness.gpu_timing import device, on_gpu
from fastlm.config import ModelConfig
from fastlm.data.prefetch import prefetch
from fastlm.data.text.batches import row_batch
from fastlm.data.text.prepare import prepare
from fastlm.tokenizer import load_tokenizer


def llama(c: ModelConfig) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        intermediate_size=c.ffn_dim,
        max_position_embeddings=c.max_seq_len,
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(device())


def train(s: Size, steps: int) -> Seen:
    """So many steps on the same text, by a plain loop: forward, backward, clip, AdamW."""
    seen = Seen(attention="sdpa")
    with on_this_machine(s):
        tokens = prepare(s.text, load_tokenizer("gpt2"), CACHE).train
        model = llama(s.model)
        compiled = torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

        def batches() -> Iterator[tuple]:
            for start in itertools.count(0, s.rows):
                x, _ = row_batch(tokens, start, s.rows, s.seq_len, 0)
                yield x, s.tokens, {"tokens": s.tokens}

        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        on_device = prefetch(batches(), device())
        watched = watched_steps(on_device, seen, steps, True, s.warmup, {})
        with contextlib.closing(watched), contextlib.suppress(Enough):
            for x, *_ in watched:
                with torch.autocast(device().type, torch.bfloat16, enabled=on_gpu()):
                    loss = compiled(input_ids=x, labels=x, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return seen

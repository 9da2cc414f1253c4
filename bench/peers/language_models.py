"""Contenders that score and write with a 135M Llama, fp32.

SmolLM2's shape with random weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import tarfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = {
    "full": 8192,
    "small": 300,
}  # scored; a window that slides by half of it sees half of them, in as many passes
WINDOW = {"full": 1024, "small": 32}
CHARACTERS = {"full": 8000, "small": 200}  # of each of four documents
PROMPT, NEW = (
    {"full": 32, "small": 3},
    {"full": 64, "small": 4},
)  # tokens to go on from, tokens to write


def shape(size: str, vocab_size: int = 0):
    from fastlm.config import PRESETS

    config = PRESETS["smollm2-135m" if size == "full" else "tiny"]
    return dataclasses.replace(config, vocab_size=vocab_size or config.vocab_size)


def text(size: str, tokens: int) -> Tensor:
    return torch.randint(
        shape(size).vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)
    )


def our_model(size: str, vocab_size: int = 0):
    from fastlm.kernels.native import keep_large_blocks
    from fastlm.model import build

    keep_large_blocks()  # as the command line does
    model = build(shape(size, vocab_size), 0, torch.device("cpu")).eval()
    with torch.no_grad():
        for block in model.blocks:  # they start at zero, and zeros might be cheaper
            block.out.weight.normal_(0, 0.02)
            block.down.weight.normal_(0, 0.02)
    return model


def their_model(size: str, vocab_size: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    c = shape(size, vocab_size)
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        intermediate_size=c.ffn_dim,
        max_position_embeddings=c.max_seq_len,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def our_score(size: str, sliding: bool) -> Callable[[], None]:
    from fastlm.evaluation.protocols import window_segments
    from fastlm.evaluation.score import segment_nats

    model, window = our_model(size), WINDOW[size]
    ids = text(size, TOKENS[size] // (2 if sliding else 1)).tolist()
    segments = window_segments(ids, window, window // 2 if sliding else window)
    return lambda: float(segment_nats(model, segments, torch.device("cpu")).sum())


def their_windows(size: str, rows: int) -> Callable[[], None]:
    """The plain loop: `rows` windows at a time, all logits, their cross-entropy."""
    model, window = their_model(size), WINDOW[size]
    ids = text(size, TOKENS[size])
    ids = ids[: len(ids) // (rows * window) * rows * window].view(-1, rows, window)

    @torch.no_grad()
    def turn() -> float:
        total = 0.0
        for batch in ids:
            logits = model(batch, use_cache=False).logits
            total += F.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
        return total

    return turn


def sliding(ids: Tensor, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The loop of the Hugging Face guide on perplexity.

    Windows by half, what was scored before is -100.
    """
    done = 0
    for begin in range(0, len(ids), window // 2):
        end = min(begin + window, len(ids))
        targets = ids[begin:end].clone()
        targets[: done - begin if done else 0] = -100
        yield ids[None, begin:end], targets[None]
        done = end
        if end == len(ids):
            return


def their_stride(size: str) -> Callable[[], None]:
    model, ids = their_model(size), text(size, TOKENS[size] // 2)

    @torch.no_grad()
    def turn() -> float:
        return sum(
            model(x, labels=y, use_cache=False).loss.item() for x, y in sliding(ids, WINDOW[size])
        )

    return turn


GPT2 = 50257  # tokens of its vocabulary


def documents(size: str) -> list[str]:
    return [
        Path(m.__file__).read_text(encoding="utf-8")[: CHARACTERS[size]]
        for m in (argparse, inspect, tarfile, typing)
    ]


def our_word(size: str) -> Callable[[], None]:
    """Tokenising included, as lm-eval does it."""
    from fastlm.evaluation.protocols import word_segments
    from fastlm.evaluation.score import segment_nats
    from fastlm.tokenizer import load_tokenizer

    model, tokenizer, texts = our_model(size, GPT2), load_tokenizer("gpt2"), documents(size)
    return lambda: segment_nats(
        model, word_segments(texts, tokenizer, WINDOW[size]), torch.device("cpu")
    )


def lm_eval_word(size: str) -> Callable[[], None]:
    """lm-eval's rolling log-likelihood of the same texts, eight windows at a time."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from fastlm.evaluation.protocols import detokenise
    from fastlm.tokenizer import gpt2_json

    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(gpt2_json()), eos_token=end, pad_token=end
    )
    model = HFLM(
        their_model(size, GPT2),
        tokenizer=tokenizer,
        device="cpu",
        batch_size=8,
        max_length=WINDOW[size],
    )
    asked = [
        Instance("loglikelihood_rolling", {}, (detokenise(text),), i)
        for i, text in enumerate(documents(size))
    ]
    return lambda: model.loglikelihood_rolling(asked, disable_tqdm=True)


def our_generate(size: str, rows: int) -> Callable[[], None]:
    from fastlm.config import Sampling
    from fastlm.inference.generation import generate

    model, prompts = our_model(size), text(size, rows * PROMPT[size]).view(rows, -1).tolist()
    return lambda: generate(model, prompts, NEW[size], Sampling(temperature=0))


def their_generate(size: str, rows: int) -> Callable[[], None]:
    model, prompts = their_model(size), text(size, rows * PROMPT[size]).view(rows, -1)
    mask = torch.ones_like(prompts)
    return lambda: model.generate(
        prompts, attention_mask=mask, max_new_tokens=NEW[size], do_sample=False
    )


LANGUAGE_MODELS: dict[str, Callable[[str], Callable[[], None]]] = {
    "our window": lambda size: our_score(size, False),
    "our stride": lambda size: our_score(size, True),
    "plain window 1": lambda size: their_windows(size, 1),
    "plain window 8": lambda size: their_windows(size, 8),
    "plain stride": their_stride,
    "our word": our_word,
    "lm-eval word": lm_eval_word,
    "our generate 1": lambda size: our_generate(size, 1),
    "our generate 8": lambda size: our_generate(size, 8),
    "their generate 1": lambda size: their_generate(size, 1),
    "their generate 8": lambda size: their_generate(size, 8),
}

"""fastlm sft against a plain PyTorch loop.

One example at a time, unpacked, torch's own loss, AdamW and schedule.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastlm.config import ModelConfig, OptimConfig, SftConfig
from fastlm.data.examples.load import load_instructions, pack_examples
from fastlm.data.examples.packing import packed_batch
from fastlm.interop.exporting import write_folder
from fastlm.interop.open_model import open_model
from fastlm.model import build
from fastlm.train.sft import sft

STEPS, WARMUP, ROWS, LEN = 10, 3, 4, 64
CPU = torch.device("cpu")


@pytest.fixture
def start(tmp_path, small_tokenizer) -> Path:
    """A random model as a Hugging Face folder."""
    shape = ModelConfig(
        vocab_size=384, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, max_seq_len=LEN
    )
    tokenizer = small_tokenizer.read_text(encoding="utf-8")
    write_folder(build(shape, 0, CPU), {"tokenizer.json": tokenizer}, 0, tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def data(tmp_path) -> Path:
    lines = [
        {"prompt": f"count to {n % 9}:", "completion": " " + " ".join(map(str, range(1 + n % 9)))}
        for n in range(60)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def plain_loop(cfg: SftConfig) -> list[float]:
    """The losses of the same steps: their examples in turn, through Hugging Face's model."""
    from transformers import AutoModelForCausalLM

    _, tokenizer = open_model(cfg.model, CPU)
    rows, _ = pack_examples(load_instructions(cfg.data, tokenizer, LEN, held_out=0.0), LEN)
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32).train()
    vectors = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=2e-3,
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: (s + 1) / WARMUP if s < WARMUP else (STEPS - s) / (STEPS - WARMUP)
    )
    losses = []
    for step in range(STEPS):
        numbers = packed_batch(rows, step * ROWS, ROWS, cfg.seed).numbers.tolist()
        examples = [rows.sequence(example) for number in numbers for example in rows.rows[number]]
        assert len(examples) > ROWS  # rows hold several examples, or packing is not tested
        counted = sum(int(flags[1:].sum()) for _, flags in examples)
        total = 0.0
        for ids, flags in examples:
            x = torch.from_numpy(ids.astype(np.int64))
            targets = torch.where(torch.from_numpy(flags[1:]), x[1:], -100)
            loss = (
                F.cross_entropy(model(x[None, :-1]).logits[0], targets, reduction="sum") / counted
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize("micro_rows", [ROWS, 1])
def test_the_loss_curve_is_the_plain_loops(micro_rows, start, data, tmp_path):
    pytest.importorskip("transformers")
    optim = OptimConfig(
        name="adamw",
        lr=2e-3,
        embedding_lr=2e-3,
        head_lr=2e-3,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.99,
        schedule="linear",
        warmup_steps=WARMUP,
        clip_norm=1.0,
    )
    cfg = SftConfig(
        model=str(start),
        data=str(data),
        out=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"),
        steps=STEPS,
        batch_rows=ROWS,
        micro_batch_rows=micro_rows,
        max_len=LEN,
        held_out=0.0,
        validate_every=0,
        checkpoint_every=0,
        device="cpu",
        optim=optim,
    )
    assert sft(cfg) == 0
    lines = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ours = [line["loss"] for line in lines if "loss" in line]
    theirs = plain_loop(cfg)
    assert theirs[-1] < theirs[0] - 0.2
    assert ours == pytest.approx(theirs, rel=1e-4)

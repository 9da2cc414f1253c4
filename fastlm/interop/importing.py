"""`fastlm import`: a Hugging Face folder as a run, with one checkpoint at step 0."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from fastlm import checkpoint, files
from fastlm.config import ImportConfig
from fastlm.errors import check
from fastlm.interop.config_json import is_hugging_face
from fastlm.interop.exporting import check_new_folder, read_tokenizer_files
from fastlm.interop.open_model import chat_template, local_folder, open_model
from fastlm.model import count_parameters
from fastlm.tokenizer import load_tokenizer


def import_folder(cfg: ImportConfig) -> int:
    """Write the folder's weights and a copy of its tokenizer as a run, and say so."""
    run = Path(cfg.to)
    check(
        is_hugging_face(local_folder(cfg.model)),
        f"{cfg.model} holds no config.json; give a Hugging Face model folder",
    )
    check_new_folder(run)
    model, tokenizer = open_model(cfg.model, torch.device("cpu"), cfg.tokenizer)
    with files.whole_folder(run) as folder:
        name = tokenizer.name
        digest = tokenizer.hash
        if name != "gpt2":
            (folder / "tokenizer").mkdir()
            for file, text in read_tokenizer_files(tokenizer).items():
                (folder / "tokenizer" / file).write_text(text, encoding="utf-8")
            digest = load_tokenizer(str(folder / "tokenizer")).hash
            name = str((run / "tokenizer" / "tokenizer.json").resolve())  # where it will stand
        state = {
            "step": 0,
            "position": 0,
            "tokens": 0,
            "train_tokens": 0,
            "validation_loss": None,
            "model": dataclasses.asdict(model.config),
            "tokenizer": name,
            "tokenizer_hash": digest,
            "start": cfg.model,
            "template": chat_template(cfg.model, tokenizer, default="auto"),
        }
        checkpoint.save(folder / "checkpoints", model, {}, state)
    millions = count_parameters(model.config) / 1e6
    print(f"{run}: {millions:.1f}M parameters, tokenizer {tokenizer.vocab_size:,} tokens")
    return 0

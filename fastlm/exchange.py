"""fastlm export and fastlm import: a run as a Hugging Face folder, and a Hugging Face folder as a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from fastlm import checkpoint, files
from fastlm.config import ExportConfig, ImportConfig
from fastlm.data.examples.templates import published_template
from fastlm.errors import UserError, check
from fastlm.interop import export, is_hugging_face
from fastlm.model import count_parameters
from fastlm.places import chat_template, local, open_model, stop_tokens
from fastlm.tokenizer import Tokenizer, gpt2_json, load_tokenizer

CPU = torch.device("cpu")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def read_beside(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokenizer's own files by name: tokenizer.json, and what stands beside it."""
    if tokenizer.name == "gpt2":
        return {"tokenizer.json": gpt2_json()}
    file = Path(tokenizer.name)
    try:
        found = {name: file.with_name(name).read_text("utf-8") for name in BESIDE if file.with_name(name).is_file()}
        return {"tokenizer.json": file.read_text("utf-8")} | found
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"could not read the tokenizer's files beside {file}: {e}") from None


def tokenizer_files(tokenizer: Tokenizer, max_len: int, template: str) -> dict[str, str]:
    """What goes beside the weights: the tokenizer's files, its configuration where it has none, and the chat template.

    template: as in ChatConfig, or "none".
    """
    texts = read_beside(tokenizer)
    texts.pop("generation_config.json", None)  # written anew, with the model's own stop tokens
    end = tokenizer.piece(tokenizer.eos_id)
    config: dict[str, Any] = json.loads(texts.get("tokenizer_config.json", "{}")) or {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_len, "bos_token": end, "eos_token": end,
        "add_bos_token": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if template not in ("none", "tokenizer"):
        texts["chat_template.jinja"] = published_template(template, tokenizer)
        config["chat_template"] = texts["chat_template.jinja"]  # where transformers before 4.53 looks
    return texts | {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def export_run(cfg: ExportConfig) -> int:
    """fastlm export: weights, configuration, tokenizer and chat template as transformers, vLLM and llama.cpp read them."""
    model, tokenizer = open_model(cfg.model, CPU, cfg.tokenizer)
    template = chat_template(cfg.model, tokenizer, default="none") if cfg.template == "auto" else cfg.template
    beside = tokenizer_files(tokenizer, model.config.max_seq_len, template)
    if cfg.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    stop = sorted(stop_tokens(cfg.model, tokenizer) - {tokenizer.eos_id})
    export(model, beside, tokenizer.eos_id, Path(cfg.to), stop=stop)
    size = sum(f.stat().st_size for f in Path(cfg.to).iterdir())
    print(f"{cfg.to}: {count_parameters(model.config) / 1e6:.1f}M parameters in {cfg.dtype}, {size / 1e6:,.1f} MB, "
          f"tokenizer {tokenizer.vocab_size:,} tokens, chat template {template}")  # fmt: skip
    return 0


def import_folder(cfg: ImportConfig) -> int:
    """fastlm import: a run with one checkpoint, step 0, that holds the folder's weights and a copy of its tokenizer."""
    run = Path(cfg.to)
    check(is_hugging_face(Path(local(cfg.model))), f"{cfg.model} holds no config.json; give a Hugging Face model folder")
    check(not run.exists() or (run.is_dir() and not any(run.iterdir())), f"{run} exists and is not empty; choose another --to")
    model, tokenizer = open_model(cfg.model, CPU, cfg.tokenizer)
    with files.whole_folder(run) as beside:
        name, hash_ = tokenizer.name, tokenizer.hash
        if name != "gpt2":
            (beside / "tokenizer").mkdir()
            for file, text in read_beside(tokenizer).items():
                (beside / "tokenizer" / file).write_text(text, encoding="utf-8")
            hash_ = load_tokenizer(str(beside / "tokenizer")).hash
            name = str((run / "tokenizer" / "tokenizer.json").resolve())  # where the copy will stand
        state = {
            "step": 0,
            "position": 0,
            "tokens": 0,
            "train_tokens": 0,
            "validation_loss": None,
            "model": dataclasses.asdict(model.config),
            "tokenizer": name,
            "tokenizer_hash": hash_,
            "start": cfg.model,
            "template": chat_template(cfg.model, tokenizer, default="auto"),
        }
        checkpoint.save(beside / "checkpoints", model, {}, state)
    print(f"{run}: {count_parameters(model.config) / 1e6:.1f}M parameters, tokenizer {tokenizer.vocab_size:,} tokens")
    return 0

"""`fastlm export`: a model as a Hugging Face folder that transformers, vLLM and llama.cpp load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastlm import files
from fastlm.config import ExportConfig
from fastlm.data.examples.templates import published_template
from fastlm.errors import UserError, check
from fastlm.interop.config_json import config_json
from fastlm.interop.open_model import chat_template, open_model, stop_tokens
from fastlm.interop.weights import hugging_face_weights, write_weights
from fastlm.model import Transformer, count_parameters
from fastlm.tokenizer import Tokenizer, gpt2_json

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def export_run(cfg: ExportConfig) -> int:
    """Write weights, configuration, tokenizer and chat template, and say what was written."""
    model, tokenizer = open_model(cfg.model, torch.device("cpu"), cfg.tokenizer)
    template = cfg.template
    if template == "auto":
        template = chat_template(cfg.model, tokenizer, default="none")
    texts = tokenizer_files(tokenizer, model.config.max_seq_len, template)
    if cfg.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    stop = sorted(stop_tokens(cfg.model, tokenizer) - {tokenizer.eos_id})
    write_folder(model, texts, tokenizer.eos_id, Path(cfg.to), stop=stop)
    size = sum(f.stat().st_size for f in Path(cfg.to).iterdir())
    print(
        f"{cfg.to}: {count_parameters(model.config) / 1e6:.1f}M parameters in {cfg.dtype}, "
        f"{size / 1e6:,.1f} MB, tokenizer {tokenizer.vocab_size:,} tokens, "
        f"chat template {template}"
    )
    return 0


def write_folder(
    model: Transformer,
    tokenizer_files: dict[str, str],
    eos_id: int,
    to: Path,
    shard_bytes: int = SHARD_BYTES,
    stop: Sequence[int] = (),
) -> None:
    """Write a folder that transformers, vLLM and llama.cpp load. It appears whole or not at all.

    tokenizer_files: name -> text, written beside the weights. stop: other ids that end a text.
    """
    check_new_folder(to)
    config = config_json(model.config, eos_id)
    config["torch_dtype"] = str(model.embedding.dtype).removeprefix("torch.")
    generation = {
        "bos_token_id": eos_id,
        "eos_token_id": [eos_id, *stop] if stop else eos_id,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    with files.whole_folder(to) as folder:
        for name, text in (texts | tokenizer_files).items():
            (folder / name).write_text(text, encoding="utf-8")
        write_weights(hugging_face_weights(model), folder, shard_bytes)


def check_new_folder(folder: Path) -> None:
    """Raise UserError where something would be overwritten."""
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    check(empty, f"{folder} exists and is not empty; choose another --to")


def tokenizer_files(tokenizer: Tokenizer, max_len: int, template: str) -> dict[str, str]:
    """Name -> text of the tokenizer's files, its configuration and its chat template.

    template: as in ChatConfig, or "none".
    """
    texts = read_tokenizer_files(tokenizer)
    texts.pop("generation_config.json", None)  # written anew, with the model's own stop tokens
    end = tokenizer.piece(tokenizer.eos_id)
    config: dict[str, Any] = json.loads(texts.get("tokenizer_config.json", "{}")) or {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "bos_token": end,
        "eos_token": end,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if template not in ("none", "tokenizer"):
        texts["chat_template.jinja"] = published_template(template, tokenizer)
        config["chat_template"] = texts["chat_template.jinja"]  # for transformers before 4.53
    written = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return texts | {"tokenizer_config.json": written}


def read_tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Name -> text of the files that the tokenizer itself came from."""
    if tokenizer.name == "gpt2":
        return {"tokenizer.json": gpt2_json()}
    file = Path(tokenizer.name)
    try:
        texts = {"tokenizer.json": file.read_text("utf-8")}
        for name in TOKENIZER_FILES:
            if file.with_name(name).is_file():
                texts[name] = file.with_name(name).read_text("utf-8")
        return texts
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"could not read the tokenizer's files beside {file}: {e}") from None

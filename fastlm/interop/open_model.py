"""A model and its tokenizer by name: a run, a checkpoint, a Hugging Face folder or hf:NAME."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from fastlm.checkpoint import load_model, locate, read_state
from fastlm.data.examples.templates import has_own_template
from fastlm.data.hub import HubOffline, network_errors, require_hub
from fastlm.errors import UserError, check
from fastlm.interop.config_json import is_hugging_face
from fastlm.interop.weights import load_hugging_face
from fastlm.model import Transformer
from fastlm.tokenizer import Tokenizer, load_tokenizer

HUB = "hf:"  # before a name on the Hugging Face hub: hf:openai-community/gpt2


def local_folder(name: str) -> Path:
    """The folder of a model; a model of the hub is downloaded, once."""
    if not name.startswith(HUB):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub_name = name.removeprefix(HUB)
    download = partial(
        snapshot_download,
        hub_name,
        allow_patterns=["*.json", "*.safetensors", "*.jinja"],
        ignore_patterns=["*/*"],
    )
    try:
        try:
            return Path(download(local_files_only=True))
        except LocalEntryNotFoundError:
            require_hub(hub_name)
            return Path(download())
    except HubOffline:
        raise UserError(
            f"model {name}: the Hugging Face hub does not answer (offline?); "
            f"connect, or name a folder"
        ) from None
    except network_errors() as e:
        reason = (str(e).splitlines() or [""])[0]
        raise UserError(
            f"model {name}: not on the Hugging Face hub, or closed ({reason})"
        ) from None


def open_model(
    name: str, device: torch.device, tokenizer: str = ""
) -> tuple[Transformer, Tokenizer]:
    """The model, ready for inference, and its tokenizer, or the tokenizer that is named."""
    folder = local_folder(name)
    if is_hugging_face(folder):
        model = load_hugging_face(folder, device)
        own_tokenizer = str(folder)
    else:
        model, state = load_model(folder, device)
        own_tokenizer = state["tokenizer"]
    return model, matching_tokenizer(tokenizer or own_tokenizer, folder, model.config.vocab_size)


def matching_tokenizer(tokenizer: str, model: str | Path, vocab_size: int) -> Tokenizer:
    """A tokenizer; UserError where it has tokens that the model does not know."""
    loaded = load_tokenizer(tokenizer)
    check(
        loaded.vocab_size <= vocab_size,
        f"{model}: tokenizer {tokenizer} has {loaded.vocab_size} tokens, but the model knows "
        f"{vocab_size}; pass the model's own with --tokenizer",
    )
    return loaded


def stop_tokens(name: str, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a model's text: end-of-text, and those of its generation_config.json."""
    file = local_folder(name) / "generation_config.json"
    eos_ids = None
    try:
        if file.is_file():
            eos_ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"could not read {file}: expected a JSON object; fetch the file again, or remove it"
        ) from None
    listed = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    return {tokenizer.eos_id, *(token for token in listed if isinstance(token, int))}


def chat_template(name: str, tokenizer: Tokenizer, default: str = "chatml") -> str:
    """The chat template that a model was taught.

    What its run says, else its tokenizer's own ("tokenizer"), else default.
    """
    folder = local_folder(name)
    if not is_hugging_face(folder):
        template = read_state(locate(folder, lowest_loss=True)).get("template", "auto")
        if template != "auto":
            return template
    return "tokenizer" if has_own_template(tokenizer) else default

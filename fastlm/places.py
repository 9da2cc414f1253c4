"""A model by its place on disk, wherever it came from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from fastlm.checkpoint import load_model, locate, read_state
from fastlm.data.examples.templates import has_own_template
from fastlm.data.hub import HubOffline, network_errors, require_hub
from fastlm.errors import UserError, check
from fastlm.interop import is_hugging_face, load_hugging_face
from fastlm.model import Transformer
from fastlm.tokenizer import Tokenizer, load_tokenizer

HUB = "hf:"  # before a name on the Hugging Face hub: hf:openai-community/gpt2


def local(place: str) -> str:
    """The folder of a model: place itself, or where the files of a hub model lie, which are fetched once."""
    if not place.startswith(HUB):
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = place.removeprefix(HUB)
    fetch = partial(snapshot_download, name, allow_patterns=["*.json", "*.safetensors", "*.jinja"], ignore_patterns=["*/*"])
    try:
        try:
            return fetch(local_files_only=True)
        except LocalEntryNotFoundError:
            require_hub(name)
            return fetch()
    except HubOffline:
        raise UserError(f"model {place}: the Hugging Face hub does not answer (offline?); connect, or name a folder") from None
    except network_errors() as e:
        raise UserError(f"model {place}: not on the Hugging Face hub, or closed ({(str(e).splitlines() or [''])[0]})") from None


def open_model(place: str, device: torch.device, tokenizer: str = "") -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a fastlm run or checkpoint, or of a Hugging Face folder of the Llama family."""
    place = local(place)
    folder = Path(place)
    if is_hugging_face(folder):
        model, name = load_hugging_face(folder, device), tokenizer or str(folder)
    else:
        model, state = load_model(folder, device)
        name = tokenizer or state["tokenizer"]
    return model, fitting_tokenizer(name, place, model.config.vocab_size)


def fitting_tokenizer(name: str, place: str, vocab_size: int) -> Tokenizer:
    """A tokenizer; UserError where it has tokens that the model at `place` does not know."""
    loaded = load_tokenizer(name)
    check(
        loaded.vocab_size <= vocab_size,
        f"{place}: tokenizer {name} has {loaded.vocab_size} tokens, but the model knows {vocab_size}; "
        f"pass the model's own with --tokenizer",
    )
    return loaded


def stop_tokens(place: str, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a model's text: end-of-text, and what a Hugging Face folder's generation_config.json adds."""
    file = Path(local(place)) / "generation_config.json"
    try:
        noted = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    except (OSError, ValueError, AttributeError):
        raise UserError(f"could not read {file}: expected a JSON object; fetch the file again, or remove it") from None
    more = noted if isinstance(noted, list) else [noted]
    return {tokenizer.eos_id, *(token for token in more if isinstance(token, int))}


def chat_template(place: str, tokenizer: Tokenizer, default: str = "chatml") -> str:
    """The chat template that a model was taught: what its run notes, else its tokenizer's own ("tokenizer"), else default."""
    place = local(place)
    if not is_hugging_face(Path(place)):
        noted = read_state(locate(place, lowest_loss=True)).get("template", "auto")
        if noted != "auto":
            return noted
    return "tokenizer" if has_own_template(tokenizer) else default

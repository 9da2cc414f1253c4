"""Weights under Hugging Face's names, to and from the safetensors files of a folder.

They keep their values bit for bit. Needs no transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlm import files
from fastlm.config import ModelConfig
from fastlm.errors import UserError, check, printable
from fastlm.interop.config_json import ADVICE, read_config
from fastlm.model import Transformer
from fastlm.schema import read_json

INDEX = "model.safetensors.index.json"


def hugging_face_names(c: ModelConfig) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Every parameter, with the Hugging Face tensors stacked in it and the rows of each."""
    q_rows = c.n_heads * c.head_dim
    kv_rows = c.n_kv_heads * c.head_dim
    yield "embedding", [("model.embed_tokens.weight", c.vocab_size)]
    for i in range(c.n_layers):
        block = f"blocks.{i}"
        layer = f"model.layers.{i}"
        projections = [
            (f"{layer}.self_attn.q_proj", q_rows),
            (f"{layer}.self_attn.k_proj", kv_rows),
            (f"{layer}.self_attn.v_proj", kv_rows),
        ]
        yield f"{block}.attention_norm.weight", [(f"{layer}.input_layernorm.weight", c.dim)]
        yield f"{block}.qkv.weight", [(f"{name}.weight", rows) for name, rows in projections]
        if c.qkv_bias:
            yield f"{block}.qkv.bias", [(f"{name}.bias", rows) for name, rows in projections]
        if c.qk_norm:
            yield f"{block}.q_norm.weight", [(f"{layer}.self_attn.q_norm.weight", c.head_dim)]
            yield f"{block}.k_norm.weight", [(f"{layer}.self_attn.k_norm.weight", c.head_dim)]
        yield f"{block}.out.weight", [(f"{layer}.self_attn.o_proj.weight", c.dim)]
        yield f"{block}.ffn_norm.weight", [(f"{layer}.post_attention_layernorm.weight", c.dim)]
        yield (
            f"{block}.gate_up.weight",
            [
                (f"{layer}.mlp.gate_proj.weight", c.ffn_dim),
                (f"{layer}.mlp.up_proj.weight", c.ffn_dim),
            ],
        )
        yield f"{block}.down.weight", [(f"{layer}.mlp.down_proj.weight", c.dim)]
    yield "norm.weight", [("model.norm.weight", c.dim)]
    if not c.tie_embeddings:
        yield "head", [("lm_head.weight", c.vocab_size)]


# ---------------------------------------------------------------- in


def load_hugging_face(folder: Path, device: torch.device) -> Transformer:
    """The model of a Hugging Face folder, in fp32, ready for inference."""
    config = read_config(folder)
    file_of = weight_files(folder)
    opened = {path: open_safetensors(path) for path in set(file_of.values())}
    check_shapes(config, file_of, opened, folder)
    model = Transformer(config)

    def read(name: str) -> Tensor:
        try:
            return opened[file_of[name]].get_tensor(name)
        except SafetensorError as e:
            raise UserError(f"could not read {name} from {file_of[name]}: {e}; {ADVICE}") from None

    copy_weights(model, read)
    return model.to(device).eval()


@torch.no_grad()
def copy_weights(model: Transformer, read: Callable[[str], Tensor]) -> None:
    """Copy Hugging Face tensors of the right shapes into the model; read gives one by name."""
    parameters = dict(model.named_parameters())
    for name, tensors in hugging_face_names(model.config):
        parameter = parameters.pop(name)
        start = 0
        for tensor_name, rows in tensors:
            parameter[start : start + rows].copy_(read(tensor_name))
            start += rows
        parameter[start:] = 0  # the vocabulary's padding
    assert not parameters, f"no Hugging Face name for {sorted(parameters)}"


def check_shapes(
    config: ModelConfig, file_of: dict[str, Path], opened: dict[Path, Any], folder: Path
) -> None:
    """Raise UserError where a tensor is missing or not of the shape that config.json asks for.

    Done before the model is made, so that a config.json which asks for far more than the files
    hold takes no memory.
    """
    for parameter, tensors in hugging_face_names(config):
        columns = input_columns(config, parameter)
        for name, rows in tensors:
            check(
                name in file_of,
                f"{folder}: tensor {name} is missing from its safetensors files; {ADVICE}",
            )
            try:
                shape = opened[file_of[name]].get_slice(name).get_shape()
            except SafetensorError as e:
                raise UserError(
                    f"could not read {name} from {file_of[name]}: {e}; {ADVICE}"
                ) from None
            check(
                shape == [rows, *columns],
                f"{folder}: {name} has shape {tuple(shape)}, "
                f"but config.json asks for {(rows, *columns)}; {ADVICE}",
            )


def input_columns(config: ModelConfig, parameter: str) -> list[int]:
    """The number of inputs of a matrix, by its name here; none for a vector."""
    if parameter.endswith(("norm.weight", "bias")):
        return []
    if parameter.endswith("out.weight"):
        return [config.n_heads * config.head_dim]
    if parameter.endswith("down.weight"):
        return [config.ffn_dim]
    return [config.dim]


def open_safetensors(path: Path) -> Any:
    check(path.is_file(), f"{path}: not a regular file; {ADVICE}")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"could not read {path}: {e}; {ADVICE}") from None


@dataclass(frozen=True)
class Index:
    """model.safetensors.index.json: tensor name -> file."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of one model.safetensors or of the shards that the index lists."""
    index = folder / INDEX
    if index.is_file():
        listed = read_json(index, Index, ADVICE).weight_map
        for file in set(listed.values()):
            check(
                file == Path(file).name and file.endswith(".safetensors"),
                f"{index}: names the file {printable(file)!r}, "
                f"expected a .safetensors file of the folder; {ADVICE}",
            )
            check(
                (folder / file).is_file(),
                f"{folder}: shard {file} is missing, though {INDEX} lists it",
            )
        return {name: folder / file for name, file in listed.items()}
    whole = folder / "model.safetensors"
    check(
        whole.is_file(),
        f"{folder} holds no model.safetensors (nor {INDEX}); only safetensors weights are read",
    )
    return dict.fromkeys(open_safetensors(whole).keys(), whole)


# ---------------------------------------------------------------- out


def hugging_face_weights(model: Transformer) -> dict[str, Tensor]:
    """Parameters under Hugging Face's names, without the vocabulary's padding."""
    weights = {}
    parameters = dict(model.named_parameters())
    for name, tensors in hugging_face_names(model.config):
        start = 0
        for tensor_name, rows in tensors:
            tensor = parameters[name].detach()[start : start + rows]
            weights[tensor_name] = tensor.cpu().clone()
            start += rows
    return weights


def write_weights(weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """One model.safetensors, or shards of at most shard_bytes (or one tensor) with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        size = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        files.write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.write_tensors(folder / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

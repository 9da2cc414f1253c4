"""Hugging Face folders in and out: config.json, safetensors and tokenizer files of the Llama family. Needs no transformers.

In: LlamaForCausalLM, MistralForCausalLM (full attention), Qwen2ForCausalLM (biases on q, k, v), Qwen3ForCausalLM (norms on
q and k). Out: the same kind that the model's own shape asks for. Weights keep their values bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlm.config import ModelConfig
from fastlm.errors import UserError, check
from fastlm.model import Transformer

KINDS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file()


# ---------------------------------------------------------------- shape


def read_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"could not read {path}: {e}; give a Hugging Face model folder") from None
    check(isinstance(found, dict), f"{path}: expected a JSON object; give a Hugging Face model folder")
    return found


def architecture(folder: Path) -> str:
    """The kind of model that a folder's config.json names."""
    c = read_json(folder)
    return (c.get("architectures") or [f"model type {c.get('model_type')}"])[0]


def read_config(folder: Path) -> ModelConfig:
    """The shape that a folder's config.json describes; anything this model cannot express raises UserError."""
    path, c, kind = folder / "config.json", read_json(folder), architecture(folder)
    check(kind in KINDS, f"{path}: architecture {kind} is not supported; expected one of {', '.join(KINDS)}")
    check(c.get("hidden_act", "silu") == "silu", f"{path}: hidden_act is {c.get('hidden_act')!r}; only silu is supported")
    check(not c.get("mlp_bias"), f"{path}: mlp_bias is set; biases in the feed-forward are not supported")
    if kind == "LlamaForCausalLM":
        check(not c.get("attention_bias"), f"{path}: attention_bias is set; a bias on the output projection is not supported")
    sliding = c.get("sliding_window") if c.get("use_sliding_window", kind == "MistralForCausalLM") else None
    check(not sliding, f"{path}: sliding_window is {sliding}; only full attention is supported")
    try:
        rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10_000.0)} | (c.get("rope_scaling") or {})
        name = rope.get("rope_type", rope.get("type", "default"))
        check(
            name in ("default", "linear", "llama3"),
            f"{path}: rope scaling {name!r} is not supported; expected default, linear or llama3",
        )
        scaling: dict[str, Any] = {} if name == "default" else {"rope_scaling": name, "rope_factor": float(rope["factor"])}
        if name == "llama3":
            scaling |= {
                "rope_low_freq_factor": float(rope["low_freq_factor"]),
                "rope_high_freq_factor": float(rope["high_freq_factor"]),
                "rope_original_len": int(rope["original_max_position_embeddings"]),
            }
        dim, heads = c["hidden_size"], c["num_attention_heads"]
        width = c.get("head_dim") or dim // heads
        return ModelConfig(
            vocab_size=c["vocab_size"],
            dim=dim,
            n_layers=c["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=c.get("num_key_value_heads") or heads,
            ffn_dim=c["intermediate_size"],
            max_seq_len=c["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
            norm_eps=float(c["rms_norm_eps"]),
            tie_embeddings=bool(c.get("tie_word_embeddings", False)),
            qk_norm=kind == "Qwen3ForCausalLM",
            qkv_bias=kind == "Qwen2ForCausalLM",
            head_width=0 if width * heads == dim else width,
            **scaling,
        )
    except KeyError as e:
        raise UserError(f"{path}: {e} is missing; expected the config.json of a {kind}") from None


def write_config(c: ModelConfig, eos_id: int) -> dict[str, Any]:
    """config.json of the kind of model that this shape is: Qwen3 with qk_norm, Qwen2 with biases, else Llama."""
    both = c.qk_norm and c.qkv_bias
    check(not both, "the model has both qk_norm and qkv_bias, and no Hugging Face Llama kind does; train it with one of them")
    kind = "Qwen3ForCausalLM" if c.qk_norm else "Qwen2ForCausalLM" if c.qkv_bias else "LlamaForCausalLM"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling != "none":
        rope |= {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        rope |= {
            "low_freq_factor": c.rope_low_freq_factor,
            "high_freq_factor": c.rope_high_freq_factor,
            "original_max_position_embeddings": c.rope_original_len,
        }
    return {
        "architectures": [kind],
        "model_type": KINDS[kind],
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        # the spelling of transformers before 5, vLLM and llama.cpp
        "rope_theta": c.rope_theta,
        "rope_scaling": None if c.rope_scaling == "none" else {k: v for k, v in rope.items() if k != "rope_theta"},
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
    }


# ---------------------------------------------------------------- weights


def names(c: ModelConfig) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Every parameter here, with the Hugging Face tensors that stand under each other in it and their rows."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    yield "embedding", [("model.embed_tokens.weight", c.vocab_size)]
    for i in range(c.n_layers):
        a, b = f"blocks.{i}.", f"model.layers.{i}."
        attention = [(b + "self_attn.q_proj.", q), (b + "self_attn.k_proj.", kv), (b + "self_attn.v_proj.", kv)]
        yield a + "attention_norm", [(b + "input_layernorm.weight", c.dim)]
        yield a + "qkv.weight", [(name + "weight", rows) for name, rows in attention]
        if c.qkv_bias:
            yield a + "qkv.bias", [(name + "bias", rows) for name, rows in attention]
        if c.qk_norm:
            yield a + "q_norm", [(b + "self_attn.q_norm.weight", c.head_dim)]
            yield a + "k_norm", [(b + "self_attn.k_norm.weight", c.head_dim)]
        yield a + "out.weight", [(b + "self_attn.o_proj.weight", c.dim)]
        yield a + "ffn_norm", [(b + "post_attention_layernorm.weight", c.dim)]
        yield a + "gate_up.weight", [(b + "mlp.gate_proj.weight", c.ffn_dim), (b + "mlp.up_proj.weight", c.ffn_dim)]
        yield a + "down.weight", [(b + "mlp.down_proj.weight", c.dim)]
    yield "norm", [("model.norm.weight", c.dim)]
    if not c.tie_embeddings:
        yield "head", [("lm_head.weight", c.vocab_size)]


@torch.no_grad()
def fill(model: Transformer, find: Callable[[str], Tensor], where: str) -> None:
    """Copy Hugging Face tensors, found by name, into the model."""
    parameters = dict(model.named_parameters())
    for name, parts in names(model.config):
        p, start = parameters.pop(name), 0
        for theirs, rows in parts:
            found, place = find(theirs), p[start : start + rows]
            check(
                found.shape == place.shape,
                f"{where}: {theirs} has shape {tuple(found.shape)}, but config.json asks for {tuple(place.shape)}",
            )
            place.copy_(found)
            start += rows
        p[start:] = 0  # the vocabulary's padding
    assert not parameters, f"no Hugging Face name for {sorted(parameters)}"


def load_hugging_face(folder: Path, device: torch.device) -> Transformer:
    """The model of a Hugging Face folder, in fp32, ready for inference."""
    where = weight_files(folder)
    model = Transformer(read_config(folder))
    handles = {path: open_safetensors(path) for path in set(where.values())}

    def find(name: str) -> Tensor:
        check(name in where, f"{folder}: tensor {name} is missing from its safetensors files")
        try:
            return handles[where[name]].get_tensor(name)
        except SafetensorError as e:
            raise UserError(f"could not read {name} from {where[name]}: {e}; fetch the file again") from None

    fill(model, find, str(folder))
    return model.to(device).eval()


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"could not read {path}: {e}; fetch the file again") from None


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of one model.safetensors or of the shards that the index lists."""
    index = folder / INDEX
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError):
            raise UserError(f"could not read {index}: expected a JSON object with weight_map; fetch the file again") from None
        missing = sorted({f for f in listed.values() if not (folder / f).is_file()})
        check(not missing, f"{folder}: shard {missing[0] if missing else ''} is missing, though {INDEX} lists it")
        return {name: folder / file for name, file in listed.items()}
    whole = folder / "model.safetensors"
    check(whole.is_file(), f"{folder} holds no model.safetensors (nor {INDEX}); only safetensors weights are read")
    return dict.fromkeys(open_safetensors(whole).keys(), whole)


def to_hugging_face(model: Transformer) -> dict[str, Tensor]:
    """Parameters under Hugging Face's names, without the vocabulary's padding."""
    out, parameters = {}, dict(model.named_parameters())
    for name, parts in names(model.config):
        start = 0
        for theirs, rows in parts:
            out[theirs] = parameters[name].detach()[start : start + rows].cpu().clone()
            start += rows
    return out


# ---------------------------------------------------------------- folders


def export(
    model: Transformer,
    tokenizer_files: dict[str, str],
    eos_id: int,
    to: Path,
    shard_bytes: int = SHARD_BYTES,
    stop: Sequence[int] = (),
) -> None:
    """Write a folder that transformers, vLLM and llama.cpp load. It appears whole or not at all.

    tokenizer_files: name -> text of the tokenizer's files, written beside the weights. stop: other ids that end a text.
    """
    check(not to.exists() or (to.is_dir() and not any(to.iterdir())), f"{to} exists and is not empty; choose another --to")
    beside = to.with_name(f".{to.name}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        ends = [eos_id, *stop] if stop else eos_id
        generation = {"bos_token_id": eos_id, "eos_token_id": ends, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
        config = write_config(model.config, eos_id) | {"torch_dtype": str(model.embedding.dtype).removeprefix("torch.")}
        texts = {
            "config.json": json.dumps(config, indent=2) + "\n",
            "generation_config.json": json.dumps(generation, indent=2) + "\n",
        }
        for name, text in (texts | tokenizer_files).items():
            (beside / name).write_text(text, encoding="utf-8")
        write_shards(to_hugging_face(model), beside, shard_bytes)
        if to.exists():
            to.rmdir()
        os.replace(beside, to)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"could not write {to}: {e}; free some space or choose another folder") from None


def write_shards(weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """One model.safetensors, or shards of at most shard_bytes (or one tensor) with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

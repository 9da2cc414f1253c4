"""Hugging Face folders in and out: config.json, safetensors and tokenizer files of the Llama family. Needs no transformers.

In: LlamaForCausalLM, MistralForCausalLM (full attention), Qwen2ForCausalLM (biases on q, k, v), Qwen3ForCausalLM (norms on
q and k). Out: the same kind that the model's own shape asks for. Weights keep their values bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlm import files
from fastlm.config import ModelConfig
from fastlm.errors import UserError, check, printable
from fastlm.model import Transformer
from fastlm.schema import SchemaError, parse, read_json, read_object

KINDS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file()


# ---------------------------------------------------------------- shape


@dataclass(frozen=True)
class RopeFields:
    """How positions are turned into angles: rope_parameters of a config.json."""

    rope_theta: float = 10_000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ConfigFields:
    """What is read of a config.json; where a field may be missing, it has transformers' default."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    num_key_value_heads: int = 0
    head_dim: int = 0
    tie_word_embeddings: bool = False
    rope_parameters: RopeFields = field(default_factory=RopeFields)
    hidden_act: str = "silu"
    mlp_bias: bool = False
    attention_bias: bool = False
    sliding_window: int = 0
    use_sliding_window: bool = False


# No published model comes near these. A larger number is damage, or means to take all memory.
LARGEST = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 20,
}
MEND = "fetch the file again, or give another model folder"


def architecture(folder: Path) -> str:
    """The kind of model that a folder's config.json names."""
    fields = read_object(folder / "config.json", MEND)
    named = fields.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return printable(named[0])
    return printable(f"model type {fields.get('model_type')}")


def read_fields(folder: Path, kind: str) -> ConfigFields:
    """config.json, checked; what holds null counts as missing."""
    path = folder / "config.json"
    found = {name: value for name, value in read_object(path, MEND).items() if value is not None}
    if "rope_parameters" not in found:  # transformers before 5 had two fields for it
        older = found.get("rope_scaling", {})
        older = {"rope_type": older.get("type", "default"), **older} if isinstance(older, dict) else older
        theta = {"rope_theta": found["rope_theta"]} if "rope_theta" in found else {}
        found["rope_parameters"] = older | theta if isinstance(older, dict) else older
    found.setdefault("use_sliding_window", kind == "MistralForCausalLM")
    try:
        fields = parse(ConfigFields, found)
    except SchemaError as error:
        raise UserError(f"{path}: {error}; {MEND}") from None
    for name, largest in LARGEST.items():
        value = getattr(fields, name)
        check(value <= largest, f"{path}: {name} is {value}, expected at most {largest:,}; {MEND}")
    return fields


def read_config(folder: Path) -> ModelConfig:
    """The shape that a folder's config.json describes; anything this model cannot express raises UserError."""
    path, kind = folder / "config.json", architecture(folder)
    check(kind in KINDS, f"{path}: architecture {kind} is not supported; expected one of {', '.join(KINDS)}")
    c = read_fields(folder, kind)
    check(c.hidden_act == "silu", f"{path}: hidden_act is {c.hidden_act!r}; only silu is supported")
    check(not c.mlp_bias, f"{path}: mlp_bias is set; biases in the feed-forward are not supported")
    if kind == "LlamaForCausalLM":
        check(not c.attention_bias, f"{path}: attention_bias is set; a bias on the output projection is not supported")
    sliding = c.sliding_window if c.use_sliding_window else 0
    check(not sliding, f"{path}: sliding_window is {sliding}; only full attention is supported")
    rope = c.rope_parameters
    check(
        rope.rope_type in ("default", "linear", "llama3"),
        f"{path}: rope scaling {rope.rope_type!r} is not supported; expected default, linear or llama3",
    )
    scaling: dict[str, Any] = {}
    if rope.rope_type != "default":
        scaling |= {"rope_scaling": rope.rope_type, "rope_factor": rope.factor}
    if rope.rope_type == "llama3":
        scaling |= {
            "rope_low_freq_factor": rope.low_freq_factor,
            "rope_high_freq_factor": rope.high_freq_factor,
            "rope_original_len": rope.original_max_position_embeddings,
        }
    heads = c.num_attention_heads
    check(heads > 0, f"{path}: num_attention_heads is 0, expected at least 1; {MEND}")
    width = c.head_dim or c.hidden_size // heads
    try:
        return ModelConfig(
            vocab_size=c.vocab_size,
            dim=c.hidden_size,
            n_layers=c.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=c.num_key_value_heads or heads,
            ffn_dim=c.intermediate_size,
            max_seq_len=c.max_position_embeddings,
            rope_theta=rope.rope_theta,
            norm_eps=c.rms_norm_eps,
            tie_embeddings=c.tie_word_embeddings,
            qk_norm=kind == "Qwen3ForCausalLM",
            qkv_bias=kind == "Qwen2ForCausalLM",
            head_width=0 if width * heads == c.hidden_size else width,
            **scaling,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


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
        yield a + "attention_norm.weight", [(b + "input_layernorm.weight", c.dim)]
        yield a + "qkv.weight", [(name + "weight", rows) for name, rows in attention]
        if c.qkv_bias:
            yield a + "qkv.bias", [(name + "bias", rows) for name, rows in attention]
        if c.qk_norm:
            yield a + "q_norm.weight", [(b + "self_attn.q_norm.weight", c.head_dim)]
            yield a + "k_norm.weight", [(b + "self_attn.k_norm.weight", c.head_dim)]
        yield a + "out.weight", [(b + "self_attn.o_proj.weight", c.dim)]
        yield a + "ffn_norm.weight", [(b + "post_attention_layernorm.weight", c.dim)]
        yield a + "gate_up.weight", [(b + "mlp.gate_proj.weight", c.ffn_dim), (b + "mlp.up_proj.weight", c.ffn_dim)]
        yield a + "down.weight", [(b + "mlp.down_proj.weight", c.dim)]
    yield "norm.weight", [("model.norm.weight", c.dim)]
    if not c.tie_embeddings:
        yield "head", [("lm_head.weight", c.vocab_size)]


@torch.no_grad()
def fill(model: Transformer, find: Callable[[str], Tensor]) -> None:
    """Copy Hugging Face tensors, found by name and of the right shapes, into the model."""
    parameters = dict(model.named_parameters())
    for name, parts in names(model.config):
        p, start = parameters.pop(name), 0
        for theirs, rows in parts:
            p[start : start + rows].copy_(find(theirs))
            start += rows
        p[start:] = 0  # the vocabulary's padding
    assert not parameters, f"no Hugging Face name for {sorted(parameters)}"


def load_hugging_face(folder: Path, device: torch.device) -> Transformer:
    """The model of a Hugging Face folder, in fp32, ready for inference."""
    config, where = read_config(folder), weight_files(folder)
    handles = {path: open_safetensors(path) for path in set(where.values())}
    check_shapes(config, where, handles, folder)
    model = Transformer(config)

    def find(name: str) -> Tensor:
        try:
            return handles[where[name]].get_tensor(name)
        except SafetensorError as e:
            raise UserError(f"could not read {name} from {where[name]}: {e}; {MEND}") from None

    fill(model, find)
    return model.to(device).eval()


def check_shapes(c: ModelConfig, where: dict[str, Path], handles: dict[Path, Any], folder: Path) -> None:
    """Raise UserError where a tensor is missing or has another shape than config.json asks for.

    Done before the model is made: a config.json that asks for far more than the files hold takes no memory.
    """
    for ours, parts in names(c):
        columns = [] if ours.endswith(("norm.weight", "bias")) else [columns_of(c, ours)]
        for name, rows in parts:
            check(name in where, f"{folder}: tensor {name} is missing from its safetensors files; {MEND}")
            try:
                shape = handles[where[name]].get_slice(name).get_shape()
            except SafetensorError as e:
                raise UserError(f"could not read {name} from {where[name]}: {e}; {MEND}") from None
            check(
                shape == [rows, *columns],
                f"{folder}: {name} has shape {tuple(shape)}, but config.json asks for {(rows, *columns)}; {MEND}",
            )


def columns_of(c: ModelConfig, name: str) -> int:
    """Inputs of a matrix, by its name here."""
    inputs = {"out.weight": c.n_heads * c.head_dim, "down.weight": c.ffn_dim}
    return next((size for end, size in inputs.items() if name.endswith(end)), c.dim)


def open_safetensors(path: Path) -> Any:
    check(path.is_file(), f"{path}: not a regular file; {MEND}")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"could not read {path}: {e}; {MEND}") from None


@dataclass(frozen=True)
class Index:
    """model.safetensors.index.json: tensor name -> file."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of one model.safetensors or of the shards that the index lists."""
    index = folder / INDEX
    if index.is_file():
        listed = read_json(index, Index, MEND).weight_map
        for file in set(listed.values()):
            plain = file == Path(file).name and file.endswith(".safetensors")
            check(plain, f"{index}: names the file {printable(file)!r}, expected a .safetensors file of the folder; {MEND}")
            check((folder / file).is_file(), f"{folder}: shard {file} is missing, though {INDEX} lists it")
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
    with files.whole_folder(to) as beside:
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


def write_shards(weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """One model.safetensors, or shards of at most shard_bytes (or one tensor) with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        files.write_tensors(folder / "model.safetensors", weights, {"format": "pt"})
        return
    shard_names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(shard_names, shards, strict=True):
        files.write_tensors(folder / name, shard, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
        "weight_map": {weight: name for name, shard in zip(shard_names, shards, strict=True) for weight in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

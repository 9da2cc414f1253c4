"""config.json of a Hugging Face folder, to and from a ModelConfig.

In: LlamaForCausalLM, MistralForCausalLM (full attention), Qwen2ForCausalLM (biases on q, k, v),
Qwen3ForCausalLM (norms on q and k). Out: the architecture that has the model's own shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.config import ModelConfig
from fastlm.errors import UserError, check, printable
from fastlm.schema import SchemaError, parse, read_object

# architecture -> model_type
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ADVICE = "fetch the file again, or give another model folder"


def is_hugging_face(folder: Path) -> bool:
    return (folder / "config.json").is_file()


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
    """What is read of a config.json; a field that may be missing has transformers' default."""

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


def read_architecture(folder: Path) -> str:
    """The architecture that a folder's config.json names."""
    fields = read_object(folder / "config.json", ADVICE)
    architectures = fields.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return printable(architectures[0])
    return printable(f"model type {fields.get('model_type')}")


def read_fields(folder: Path, architecture: str) -> ConfigFields:
    """config.json, checked; a field that is null counts as missing."""
    path = folder / "config.json"
    values = {name: v for name, v in read_object(path, ADVICE).items() if v is not None}
    if "rope_parameters" not in values:
        values["rope_parameters"] = older_rope_parameters(values)
    values.setdefault("use_sliding_window", architecture == "MistralForCausalLM")
    try:
        fields = parse(ConfigFields, values)
    except SchemaError as error:
        raise UserError(f"{path}: {error}; {ADVICE}") from None
    for name, largest in LARGEST.items():
        value = getattr(fields, name)
        check(
            value <= largest, f"{path}: {name} is {value}, expected at most {largest:,}; {ADVICE}"
        )
    return fields


def older_rope_parameters(values: dict[str, Any]) -> Any:
    """rope_parameters from the two fields that transformers before 5 wrote instead."""
    scaling = values.get("rope_scaling", {})
    if not isinstance(scaling, dict):
        return scaling  # the parser says what is wrong with it
    rope = {"rope_type": scaling.get("type", "default"), **scaling}
    if "rope_theta" in values:
        rope["rope_theta"] = values["rope_theta"]
    return rope


def read_config(folder: Path) -> ModelConfig:
    """The shape that a config.json describes; UserError for what this model cannot express."""
    path = folder / "config.json"
    architecture = read_architecture(folder)
    check(
        architecture in ARCHITECTURES,
        f"{path}: architecture {architecture} is not supported; "
        f"expected one of {', '.join(ARCHITECTURES)}",
    )
    fields = read_fields(folder, architecture)
    check_supported(fields, architecture, path)
    heads = fields.num_attention_heads
    check(heads > 0, f"{path}: num_attention_heads is 0, expected at least 1; {ADVICE}")
    head_dim = fields.head_dim or fields.hidden_size // heads
    try:
        return ModelConfig(
            vocab_size=fields.vocab_size,
            dim=fields.hidden_size,
            n_layers=fields.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=fields.num_key_value_heads or heads,
            ffn_dim=fields.intermediate_size,
            max_seq_len=fields.max_position_embeddings,
            rope_theta=fields.rope_parameters.rope_theta,
            norm_eps=fields.rms_norm_eps,
            tie_embeddings=fields.tie_word_embeddings,
            qk_norm=architecture == "Qwen3ForCausalLM",
            qkv_bias=architecture == "Qwen2ForCausalLM",
            head_width=0 if head_dim * heads == fields.hidden_size else head_dim,
            **rope_scaling(fields.rope_parameters),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_supported(fields: ConfigFields, architecture: str, path: Path) -> None:
    """Raise UserError for a feature of the four architectures that this model does not have."""
    activation = fields.hidden_act
    check(activation == "silu", f"{path}: hidden_act is {activation!r}; only silu is supported")
    check(
        not fields.mlp_bias,
        f"{path}: mlp_bias is set; biases in the feed-forward are not supported",
    )
    check(
        not (architecture == "LlamaForCausalLM" and fields.attention_bias),
        f"{path}: attention_bias is set; a bias on the output projection is not supported",
    )
    sliding = fields.sliding_window if fields.use_sliding_window else 0
    check(not sliding, f"{path}: sliding_window is {sliding}; only full attention is supported")
    rope_type = fields.rope_parameters.rope_type
    check(
        rope_type in ("default", "linear", "llama3"),
        f"{path}: rope scaling {rope_type!r} is not supported; expected default, linear or llama3",
    )


def rope_scaling(rope: RopeFields) -> dict[str, Any]:
    """The fields of ModelConfig that say how RoPE's frequencies are scaled; none for default."""
    if rope.rope_type == "default":
        return {}
    scaling: dict[str, Any] = {"rope_scaling": rope.rope_type, "rope_factor": rope.factor}
    if rope.rope_type == "llama3":
        scaling["rope_low_freq_factor"] = rope.low_freq_factor
        scaling["rope_high_freq_factor"] = rope.high_freq_factor
        scaling["rope_original_len"] = rope.original_max_position_embeddings
    return scaling


def config_json(config: ModelConfig, eos_id: int) -> dict[str, Any]:
    """config.json for this shape: Qwen3 with qk_norm, Qwen2 with qkv_bias, else Llama."""
    check(
        not (config.qk_norm and config.qkv_bias),
        "the model has both qk_norm and qkv_bias, and no Hugging Face Llama kind does; "
        "train it with one of them",
    )
    architecture = "LlamaForCausalLM"
    if config.qk_norm:
        architecture = "Qwen3ForCausalLM"
    if config.qkv_bias:
        architecture = "Qwen2ForCausalLM"
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        scaling["low_freq_factor"] = config.rope_low_freq_factor
        scaling["high_freq_factor"] = config.rope_high_freq_factor
        scaling["original_max_position_embeddings"] = config.rope_original_len
    return {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        # the spelling of transformers before 5, vLLM and llama.cpp
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling == "none" else scaling,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
    }

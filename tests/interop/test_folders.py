"""Hugging Face folders in and out, against transformers itself.

Weights keep every bit, and each fault has its line.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import randomised
from safetensors.torch import load_file, save_file

from fastlm import files
from fastlm.config import ModelConfig
from fastlm.errors import UserError
from fastlm.interop.config_json import read_config
from fastlm.interop.exporting import write_folder
from fastlm.interop.weights import INDEX, hugging_face_weights, load_hugging_face
from fastlm.model import Transformer

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab_size=150, dim=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=80, max_seq_len=64
)
LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_original_len": 16,
    "rope_theta": 300.0,
}
SHAPES = {
    "llama, grouped queries, tied": SMALL,
    "llama, untied, wide heads": replace(SMALL, tie_embeddings=False, head_width=20),
    "llama, linear scaling": replace(SMALL, rope_scaling="linear", rope_factor=4.0),
    "llama3 scaling": replace(SMALL, **LLAMA3),
    "qwen2, biases": replace(SMALL, qkv_bias=True, n_kv_heads=4),
    "qwen3, norms": replace(SMALL, qk_norm=True, head_width=16, tie_embeddings=False),
}


def exported(tmp_path: Path, config: ModelConfig = SMALL, **options) -> tuple[Path, Transformer]:
    model = randomised(config)
    write_folder(model, {}, 0, tmp_path / "out", **options)
    return tmp_path / "out", model


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_an_exported_folder_and_agrees(name, tmp_path):
    folder, model = exported(tmp_path, SHAPES[name])
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(150, (2, 60), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_a_round_trip_keeps_every_bit_and_the_shape(name, tmp_path):
    folder, model = exported(tmp_path, SHAPES[name])
    again = load_hugging_face(folder, CPU)
    assert again.config == model.config
    for (key, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_that_transformers_wrote_is_read(name, tmp_path):
    folder, _ = exported(tmp_path, SHAPES[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / INDEX).is_file()
    model = load_hugging_face(tmp_path / "theirs", CPU)
    tokens = torch.randint(150, (2, 33), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_shards_hold_everything_once_and_load_back(tmp_path):
    folder, model = exported(tmp_path, shard_bytes=20_000)
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3
    held = [key for file in files for key in load_file(file)]
    assert sorted(held) == sorted(hugging_face_weights(model))
    again = load_hugging_face(folder, CPU)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_half_precision_weights_are_read_exactly(tmp_path):
    folder, model = exported(tmp_path)
    half = {k: v.bfloat16() for k, v in hugging_face_weights(model).items()}
    save_file(half, folder / "model.safetensors")
    again = load_hugging_face(folder, CPU)
    assert torch.equal(again.embedding[:150], half["model.embed_tokens.weight"].float())


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


def folder_for_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def write_index(folder: Path, file: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))


FAULTS = {
    "cut short": (lambda f: cut(f / "model.safetensors"), "could not read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a tensor missing": (drop_tensor, "tensor model.norm.weight is missing"),
    "wrong shape": (
        lambda f: change_config(f, intermediate_size=81),
        "has shape (80, 48), but config.json asks for (81, 48)",
    ),
    "architecture": (
        lambda f: change_config(f, architectures=["GPT2LMHeadModel"]),
        "GPT2LMHeadModel is not supported",
    ),
    "scaling": (
        lambda f: change_config(f, rope_parameters={"rope_type": "yarn", "factor": 2}),
        "'yarn' is not supported",
    ),
    "activation": (lambda f: change_config(f, hidden_act="gelu"), "only silu"),
    "bias": (lambda f: change_config(f, attention_bias=True), "attention_bias is set"),
    "feed-forward bias": (lambda f: change_config(f, mlp_bias=True), "mlp_bias is set"),
    "key missing": (lambda f: change_config(f, hidden_size="gone"), "no field hidden_size"),
    "text for a number": (
        lambda f: change_config(f, hidden_size="48"),
        "hidden_size: got '48', expected a whole number",
    ),
    "a list for a number": (
        lambda f: change_config(f, num_hidden_layers=[2]),
        "num_hidden_layers: got [2]",
    ),
    "negative": (lambda f: change_config(f, vocab_size=-1), "vocab_size: got -1"),
    "no heads": (lambda f: change_config(f, num_attention_heads=0), "num_attention_heads is 0"),
    "no layers": (lambda f: change_config(f, num_hidden_layers=0), "n_layers is 0"),
    "far too wide": (
        lambda f: change_config(f, hidden_size=10**12),
        "hidden_size is 1000000000000, expected at most",
    ),
    "far too deep": (
        lambda f: change_config(f, num_hidden_layers=10**5),
        "num_hidden_layers is 100000, expected at most",
    ),
    "far too long": (
        lambda f: change_config(f, max_position_embeddings=10**9),
        "max_position_embeddings is 1000000000",
    ),
    "deeper than its weights": (
        lambda f: change_config(f, num_hidden_layers=900),
        "tensor model.layers.2.",
    ),
    "wider than its weights": (
        lambda f: change_config(f, vocab_size=4_000_000),
        "config.json asks for (4000000, 48)",
    ),
    "base of text": (
        lambda f: change_config(f, rope_parameters={"rope_theta": "1e4"}),
        "rope_theta: got '1e4'",
    ),
    "rope of another kind": (
        lambda f: change_config(f, rope_parameters=[]),
        "rope_parameters: got []",
    ),
    "old rope of another kind": (
        lambda f: change_config(f, rope_parameters="gone", rope_scaling="linear"),
        "rope_parameters: got 'linear'",
    ),
    "architectures of numbers": (
        lambda f: change_config(f, architectures=[7]),
        "model type llama is not supported",
    ),
    "not an object": (
        lambda f: (f / "config.json").write_text("[]"),
        "got [], expected a JSON object",
    ),
    "nested too deeply": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "nested too deeply",
    ),
    "a folder for weights": (folder_for_weights, "holds no model.safetensors"),
    "index out of the folder": (
        lambda f: write_index(f, "../model.safetensors"),
        "expected a .safetensors file of the folder",
    ),
    "index of an absolute path": (
        lambda f: write_index(f, "/etc/passwd"),
        "expected a .safetensors file of the folder",
    ),
    "index of numbers": (lambda f: write_index(f, 7), "got 7, expected text"),
    "index of a pickle": (
        lambda f: write_index(f, "model.bin"),
        "expected a .safetensors file of the folder",
    ),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_folder_is_one_line(name, tmp_path):
    harm, words = FAULTS[name]
    folder, _ = exported(tmp_path)
    harm(folder)
    with pytest.raises(UserError) as caught:
        load_hugging_face(folder, CPU)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    folder, _ = exported(tmp_path, shard_bytes=20_000)
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"shard {gone.name} is missing"):
        load_hugging_face(folder, CPU)


def test_sliding_windows_are_refused_only_where_they_are_used(tmp_path):
    folder, _ = exported(tmp_path, SHAPES["qwen2, biases"])
    change_config(folder, sliding_window=16, use_sliding_window=False)
    assert read_config(folder).qkv_bias
    change_config(folder, use_sliding_window=True)
    with pytest.raises(UserError, match="sliding_window is 16"):
        read_config(folder)


def test_export_refuses_a_full_folder_and_leaves_nothing_on_a_full_disk(tmp_path, monkeypatch):
    folder, model = exported(tmp_path)
    with pytest.raises(UserError, match="exists and is not empty"):
        write_folder(model, {}, 0, folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_folder(model, {}, 0, tmp_path / "other")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}

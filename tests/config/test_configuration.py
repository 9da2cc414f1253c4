"""Recipes, presets, overrides; every mistake is named with the nearest valid word."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastlm.config import (
    PRESETS,
    DataPrepareConfig,
    DpoConfig,
    EvalConfig,
    GenerateConfig,
    LmEvalConfig,
    ModelConfig,
    OptimConfig,
    PipelineConfig,
    PretrainConfig,
    SftConfig,
)
from fastlm.config.command_line import parse
from fastlm.config.toml import RECIPES, is_same, load_recipe, override, to_toml
from fastlm.errors import UserError


def pretrain(*argv: str) -> PretrainConfig:
    return parse(PretrainConfig, argv)


def test_every_shipped_recipe_loads():
    stages = {
        "pretrain": PretrainConfig,
        "sft": SftConfig,
        "dpo": DpoConfig,
        "pipeline": PipelineConfig,
    }
    found = {stage: [p.stem for p in (RECIPES / stage).glob("*.toml")] for stage in stages}
    assert {"demo", "modern-253m"} <= set(found["pretrain"])
    for stage, names in found.items():
        assert names
        for name in names:
            assert load_recipe(stages[stage], name).recipe == name


def test_the_published_recipe_has_the_published_shape_and_batch():
    config = load_recipe(PretrainConfig, "modern-253m")
    assert config.model == PRESETS["modern-253m"]
    assert (config.batch_rows, config.seq_len) == (32, 1024)


def test_flags_override_the_recipe_and_nested_fields_their_preset():
    options = "--preset tiny --model.dim 128 --optim.lr=1e-4 --steps 1_000 --compile --seed 7"
    config = pretrain(*options.split())
    assert config.model == replace(PRESETS["tiny"], dim=128)
    assert (config.optim.lr, config.steps, config.compile, config.seed) == (1e-4, 1000, True, 7)
    assert config.optim.schedule == load_recipe(PretrainConfig, "demo").optim.schedule
    assert pretrain("--compile", "--no-compile").compile is False


def test_a_configuration_survives_being_written_and_read(tmp_path):
    config = pretrain(
        "--preset",
        "tiny",
        "--model.dim",
        "128",
        "--data",
        'a "quoted"\\name',
        "--optim.name",
        "adamw",
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_recipe(PretrainConfig, str(path)) == config


def test_a_note_is_known_again_though_fields_were_added_since():
    config = parse(PipelineConfig, ["--sft.steps", "3"])
    noted = to_toml(config)
    older = "".join(line for line in noted.splitlines(True) if not line.startswith("tensorboard"))
    assert len(older.splitlines()) == len(noted.splitlines()) - 3
    for text in (noted, older):
        assert is_same(config, text)
        assert not is_same(parse(PipelineConfig, ["--sft.steps", "4"]), text)
    changed = parse(PipelineConfig, ["--sft.steps", "3", "--dpo.tensorboard"])
    assert not is_same(changed, older)
    assert not is_same(config, "unknown = 1\n" + noted)
    assert not is_same(config, noted[: len(noted) // 2] + "half a line")


MISTAKES = {
    "unknown flag": (["--step", "1"], "unknown option --step; did you mean --steps"),
    "unknown nested flag": (
        ["--optim.lrr", "1"],
        "unknown option --optim.lrr; did you mean --optim.lr",
    ),
    "not a number": (["--steps", "ten"], "--steps is 'ten'; it must be an integer"),
    "a fraction where an integer is due": (
        ["--steps", "1.5"],
        "--steps is '1.5'; it must be an integer",
    ),
    "not a finite number": (["--optim.lr", "nan"], "--optim.lr is nan; it must be finite"),
    "negative": (["--steps", "-3"], "steps is -3; it must be a positive integer"),
    "zero": (["--batch-rows", "0"], "batch_rows is 0; it must be a positive integer"),
    "negative rate": (["--optim.lr", "-1"], "optim.lr is -1.0; it must be positive"),
    "unknown preset": (
        ["--preset", "modern-253"],
        "unknown preset 'modern-253'; did you mean modern-253m",
    ),
    "unknown recipe": (["--recipe", "dmo"], "unknown recipe 'dmo'; did you mean demo"),
    "unknown choice": (["--optim.name", "adam"], "--optim.name is 'adam'; did you mean adamw"),
    "heads do not divide": (
        ["--model.n-heads", "7"],
        "model.n_heads is 7, which does not divide model.dim",
    ),
    "longer than the table": (
        ["--seq-len", "100000"],
        "seq_len is 100000, but model.max_seq_len is",
    ),
    "micro-batch does not divide": (
        ["--micro-batch-rows", "3", "--batch-rows", "8"],
        "does not divide batch_rows 8",
    ),
    "missing value": (["--steps"], "--steps needs a value"),
    "stray word": (["fast"], "unexpected argument 'fast'"),
    "not a run folder": (["--resume", "no/such/run"], "no/such/run is not a run folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(name):
    argv, words = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        pretrain(*argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


TOML_MISTAKES = {
    "unknown key": ("stepz = 3\n", "unknown key 'stepz'; did you mean steps"),
    "unknown key in a table": (
        "[optim]\nlearning_rate = 0.1\n",
        "unknown key 'optim.learning_rate'",
    ),
    "key of a table": ("lr = 1.0\n", "unknown key 'lr'; did you mean optim.lr?"),
    "too large": ("seed = 9223372036854775808\n", "it must lie between -2^63 and 2^63"),
    "wrong type": ('steps = "3"\nbatch_rows = true\n', "batch_rows is True; it must be an integer"),
    "out of range": ("[optim]\nlr = -1.0\n", "optim.lr is -1.0; it must be positive"),
    "unknown preset": ('preset = "tny"\n', "unknown preset 'tny'; did you mean tiny"),
    "table expected": ("model = 3\n", "model is 3; it must be a table"),
    "not TOML": ("steps = \n", "not a TOML file"),
}


@pytest.mark.parametrize("name", TOML_MISTAKES)
def test_a_mistake_in_a_recipe_names_the_file_and_the_key(name, tmp_path):
    text, words = TOML_MISTAKES[name]
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        pretrain("--recipe", str(path))
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_resumed_run_keeps_its_configuration_but_for_its_length(tmp_path):
    config = pretrain("--preset", "tiny", "--optim.lr", "0.5")
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    resumed = pretrain("--resume", str(tmp_path), "--steps", "999")
    assert resumed == replace(config, resume=str(tmp_path), steps=999)
    with pytest.raises(UserError, match="--optim.lr cannot change when a run is resumed"):
        pretrain("--resume", str(tmp_path), "--optim.lr", "1")


def test_generate_takes_the_model_as_its_first_word():
    config = parse(GenerateConfig, ["runs/x", "--temperature", "0"], "model")
    assert (config.model, config.temperature) == ("runs/x", 0.0)
    assert config == parse(GenerateConfig, ["--temperature", "0", "runs/x"], "model")
    assert config == parse(GenerateConfig, ["--temperature=0", "--model", "runs/x"], "model")


def test_several_models_and_sources_are_words_in_a_row():
    assert parse(EvalConfig, ["a", "b", "--json"], "models...").models == "a,b"
    assert parse(DataPrepareConfig, ["a", "--out", "o", "b"], "sources...").sources == ("a", "b")


def test_what_follows_lm_evals_model_is_left_as_it_is():
    config = parse(LmEvalConfig, ["runs/x", "--tasks", "a,b", "--help"], "model", "arguments")
    assert config == LmEvalConfig("runs/x", ("--tasks", "a,b", "--help"))


def test_an_option_is_written_with_dashes_or_underscores_and_switched_off_in_one_way_only():
    assert pretrain("--batch_rows=2", "--no-model.tie_embeddings").batch_rows == 2
    assert pretrain("--no-model.qk-norm").model.qk_norm is False
    with pytest.raises(
        UserError, match=r"unknown option --model.no-qk-norm; did you mean --no-model.qk-norm"
    ):
        pretrain("--model.no-qk-norm")


def test_an_option_may_be_given_several_times(tmp_path):
    config = parse(GenerateConfig, ["runs/x", "--stop", "a, b", "--stop=c"], "model")
    assert config.stop == ("a, b", "c")
    assert config.prompt == GenerateConfig().prompt
    assert 'stop = ["a, b", "c"]' in to_toml(config).splitlines()


def test_override_leaves_the_original_alone():
    config = PretrainConfig()
    assert override(config, {"optim": {"lr": 1.0}}, "here").optim == replace(OptimConfig(), lr=1.0)
    assert config == PretrainConfig()
    assert isinstance(config.model, ModelConfig)

"""What several test files share: a small tokenizer, a small text, and the folders of a run."""

from __future__ import annotations

import argparse
import inspect
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastlm.cli import main

VOCAB = 384


@pytest.fixture(scope="session")
def small_text(tmp_path_factory) -> Path:
    """About 200 kB of real text that every machine has."""
    path = tmp_path_factory.mktemp("text") / "source.txt"
    path.write_text(
        inspect.getsource(argparse) + "\n\n" + inspect.getsource(tarfile), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory, small_text) -> Path:
    """A byte-level BPE of 384 tokens as a tokenizer.json, trained on the small text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(small_text)], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    assert len(json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]) == VOCAB
    return path


@pytest.fixture
def small_run(small_text, small_tokenizer, tmp_path) -> list[str]:
    """Arguments of a pretraining run that takes about a tenth of a second a step."""
    options = (
        "--preset tiny --batch-rows 8 --seq-len 32 --steps 12 --validate-every 6 "
        f"--checkpoint-every 4 --device cpu --model.vocab-size {VOCAB}"
    )
    paths = {"tokenizer": small_tokenizer, "data": small_text, "cache": tmp_path / "cache"}
    return [*options.split(), *(f"--{name}={path}" for name, path in paths.items())]


@pytest.fixture
def mistake(capsys) -> Callable[[list[str]], str]:
    """Runs a command that must fail: exit code 2 and one line on stderr, which is returned."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastlm: "), error
        assert error.count("\n") == 1, error
        return error

    return run

"""The package from Python: light to import, and the same texts and figures as the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastlm
from fastlm.cli import main
from fastlm.errors import UserError

README = Path(__file__).parents[1] / "README.md"
VOCAB = 384  # of the small tokenizer


@pytest.fixture(scope="module")
def run(small_text, small_tokenizer, tmp_path_factory) -> Path:
    """A folder in which runs/pretrain-demo is a model of two layers that was trained for a step."""
    root = tmp_path_factory.mktemp("api")
    shape = ["--preset", "tiny", "--model.vocab-size", str(VOCAB), "--model.max-seq-len", "64"]
    data = ["--tokenizer", str(small_tokenizer), "--data", str(small_text), "--seq-len", "32"]
    length = ["--steps", "1", "--batch-rows", "2", "--validate-every", "0", "--device", "cpu"]
    folders = ["--cache", str(root / "cache"), "--out", str(root / "runs" / "pretrain-demo")]
    assert main(["pretrain", *shape, *data, *length, *folders]) == 0
    return root / "runs" / "pretrain-demo"


def test_import_brings_neither_torch_nor_a_configuration():
    code = "import fastlm, sys; dir(fastlm); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "dataclasses", "fastlm.config"} & set(done.stdout.split())


def test_public_names_are_those_of_their_modules():
    from fastlm import kernels
    from fastlm.config import ModelConfig
    from fastlm.language_model import load
    from fastlm.model import Transformer

    for name, value in (("ModelConfig", ModelConfig), ("Transformer", Transformer), ("load", load)):
        assert getattr(fastlm, name) is value
    assert fastlm.kernels is kernels
    assert {*fastlm.__all__, "__version__"} == {*dir(fastlm)}
    with pytest.raises(AttributeError, match="module 'fastlm' has no attribute 'lod'"):
        fastlm.lod  # noqa: B018


def test_the_readmes_python_runs_as_it_stands(run, monkeypatch, capsys):
    (block,) = re.findall(
        r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    monkeypatch.chdir(run.parents[1])
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out == fastlm.load(str(run)).generate("def main(") + "\n"
    head = names["head"]
    assert head.grad.shape == head.shape
    assert head.grad.abs().sum() > 0


def test_generate_writes_what_the_command_writes(run, capsys):
    options = ["--tokens", "9", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--json"]
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "def main(", "--stop", "e", *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    model = fastlm.load(str(run), device="cpu")
    text = model.generate("def main(", 9, temperature=0.8, top_p=0.9, seed=3, stop=["e"])
    assert text == row["text"]
    assert text != model.generate("def main(", 9, temperature=0.8, top_p=0.9, seed=4, stop=["e"])


def test_perplexity_is_what_the_command_prints(run, small_text, tmp_path, capsys):
    text = small_text.read_text(encoding="utf-8")[:5000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    capsys.readouterr()
    command = ["eval", str(run), "--data", str(tmp_path / "text.txt"), "--protocols", "window"]
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert fastlm.load(str(run)).perplexity(text) == row["perplexity"]


def test_a_hugging_face_folder_loads_as_the_run_that_it_was_exported_from(run, tmp_path):
    assert main(["export", str(run), "--to", str(tmp_path / "hf")]) == 0
    texts = [fastlm.load(str(p)).generate("import", 8) for p in (run, tmp_path / "hf")]
    assert texts[0] == texts[1]


def test_a_mistake_is_a_user_error(run):
    with pytest.raises(UserError, match="no/such/run does not exist; give a run folder"):
        fastlm.load("no/such/run")
    with pytest.raises(UserError, match="top_p is 2; it must lie in"):
        fastlm.load(str(run)).generate("x", top_p=2)
    with pytest.raises(UserError, match="too few for a window of 64; give a longer text"):
        fastlm.load(str(run)).perplexity("short")

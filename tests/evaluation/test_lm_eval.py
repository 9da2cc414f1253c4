"""lm-eval's tasks: the same results as lm-eval's own Hugging Face model, from local files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fastlm.cli import main
from fastlm.config import ModelConfig
from fastlm.interop.exporting import write_folder
from fastlm.model import build

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=384, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64
)
DOCUMENTS = [
    " = One = \n\n It 's said ( by all ) that 1 @,@ 000 half @-@ days make no year . \n" * 6,
    ' = Two = \n\n A " short " one ; no more : \n',
]

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
task: local_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: local_wikitext
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: !function preprocess_wikitext.wikitext_detokenizer
process_results: !function preprocess_wikitext.process_results
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def folder(small_tokenizer, tmp_path_factory) -> Path:
    model = build(CONFIG, 0, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    place = tmp_path_factory.mktemp("harness") / "model"
    beside = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    files = {
        "tokenizer.json": small_tokenizer.read_text("utf-8"),
        "tokenizer_config.json": json.dumps(beside),
    }
    write_folder(model.eval(), files, 0, place)
    return place


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of task files and their data: 12 questions of various lengths, and two documents."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval (extra lm-eval) is not installed")
    place = tmp_path_factory.mktemp("tasks")
    questions = [
        {
            "question": "def " + "value " * (3 * n % 29) + "is",
            "choices": [" not", " in range", " None:"],
            "answer": n % 3,
        }
        for n in range(12)
    ]
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (place / "pages.jsonl").write_text("\n".join(json.dumps({"page": d}) for d in DOCUMENTS))
    for name, text, data in (
        ("c", CHOICES, "questions"),
        ("w", WRITING, "questions"),
        ("r", ROLLING, "pages"),
    ):
        (place / f"{name}.yaml").write_text(text.replace("DATA", str(place / f"{data}.jsonl")))
    own = Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "preprocess_wikitext.py"
    (place / own.name).write_text(own.read_text())
    return place


@pytest.fixture(scope="module")
def evaluated(folder, tasks):
    """Results and samples of lm-eval's own Hugging Face model and of ours."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from fastlm.evaluation.lm_eval_model import register

    os.environ["HF_DATASETS_OFFLINE"] = (
        "1"  # lm-eval's data library would otherwise ask the hub about "json"
    )
    register()
    arguments = {
        "tasks": ["local_choices", "local_writing", "local_wikitext"],
        "device": "cpu",
        "bootstrap_iters": 0,
        "task_manager": TaskManager(include_path=str(tasks), include_defaults=False),
        "log_samples": True,
    }
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32", batch_size=1, **arguments
    )
    ours = lm_eval.simple_evaluate(model="fastlm", model_args=f"pretrained={folder}", **arguments)
    return theirs, ours


def test_choices_are_scored_as_by_lm_evals_own_model(evaluated):
    theirs, ours = (e["samples"]["local_choices"] for e in evaluated)
    assert len(ours) == 12
    for a, b in zip(theirs, ours, strict=True):
        for (logp, greedy), (mine, my_greedy) in zip(
            a["filtered_resps"], b["filtered_resps"], strict=True
        ):
            assert mine == pytest.approx(logp, rel=1e-5, abs=1e-5)
            assert my_greedy == greedy
    figures = [e["results"]["local_choices"] for e in evaluated]
    assert figures[0]["acc,none"] == figures[1]["acc,none"]


def test_texts_are_written_as_by_lm_evals_own_model(evaluated):
    theirs, ours = ([s["resps"] for s in e["samples"]["local_writing"]] for e in evaluated)
    assert ours == theirs
    assert len({str(r) for r in ours}) > 1


def test_word_perplexity_is_lm_evals_own(evaluated, folder, tasks, capsys):
    theirs, ours = (e["results"]["local_wikitext"] for e in evaluated)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert ours[f"{name},none"] == pytest.approx(theirs[f"{name},none"], rel=1e-5)
    rows = "\n".join(json.dumps({"text": d}) for d in DOCUMENTS)
    (tasks / "text.jsonl").write_text(rows)
    capsys.readouterr()
    assert (
        main(
            [
                "eval",
                str(folder),
                "--data",
                str(tasks / "text.jsonl"),
                "--protocols",
                "word",
                "--json",
            ]
        )
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["bits_per_byte"] == pytest.approx(theirs["bits_per_byte,none"], rel=1e-6)
    assert row["word_perplexity"] == pytest.approx(
        theirs["word_perplexity,none"], rel=1e-5
    )  # e^x: the exponent is 10


def test_the_command_takes_lm_evals_options(folder, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    out = tmp_path / "out.json"
    options = f"--tasks local_choices --limit 3 --device cpu --include_path {tasks}"
    assert main(["lm-eval", str(folder), *options.split(), "--output_path", str(out)]) == 0
    (written,) = tmp_path.rglob("*.json")
    found = json.loads(written.read_text())
    assert found["n-samples"]["local_choices"]["effective"] == 3
    assert "local_choices" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["lm-eval"], ["lm-eval", "--tasks", "x"]])
def test_without_a_model_one_line_says_how(argv, capsys):
    assert main(argv) == 2
    assert "lm-eval needs MODEL" in capsys.readouterr().err


def test_a_mistake_in_the_model_is_one_line(tasks, tmp_path, capsys):
    command = [
        "lm-eval",
        str(tmp_path / "none"),
        "--tasks",
        "local_choices",
        "--include_path",
        str(tasks),
    ]
    assert main(command) == 2
    assert "fastlm: " in capsys.readouterr().err.splitlines()[-1]

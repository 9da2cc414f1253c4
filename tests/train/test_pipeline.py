"""fastlm pipeline: the three stages, the table with their numbers, and going on after a stop at any
point.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastlm import checkpoint
from fastlm.cli import main
from fastlm.data.examples.load import load_instructions, load_preferences
from fastlm.interop.open_model import open_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_text, small_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    words = [a + b for a in ("ka", "lo", "mi", "nu") for b in ("dan", "fel", "gor", "hin", "jup")]
    rows = [
        {"prompt": f"say {w}:", "completion": f" {w}", "chosen": f" {w}", "rejected": f" {v} {v}"}
        for w in words
        for v in words
        if w != v
    ]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8"
    )
    (folder / "text.txt").write_text(
        small_text.read_text(encoding="utf-8")[:4000], encoding="utf-8"
    )
    tuning = f'data = "{folder}/rows.jsonl"\ncache = "{folder}/cache"\n'
    tuning += "batch_rows = 2\nsteps = 6\nmax_len = 32\n"
    tuning += "held_out = 0.3\ncheckpoint_every = 2\n"
    (folder / "small.toml").write_text(
        f"""
[pretrain]
preset = "tiny"
data = "{small_text}"
tokenizer = "{small_tokenizer}"
cache = "{folder}/cache"
steps = 6
seq_len = 64
validate_every = 3
checkpoint_every = 2
[pretrain.model]
vocab_size = 384
[pretrain.optim]
warmup_steps = 2
[sft]
{tuning}
[dpo]
{tuning}
[eval]
data = "{folder}/text.txt"
protocols = "window,stride"
device = "cpu"
""",
        encoding="utf-8",
    )
    return folder / "small.toml"


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> tuple[Path, str]:
    """A pipeline that ran through, and what it printed."""
    out, printed = tmp_path_factory.mktemp("pipeline") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["pipeline", str(recipe), "--out", str(out)]) == 0
    return out, printed.getvalue()


def test_the_table_has_the_stages_own_numbers(recipe, whole):
    out, text = whole
    rows = json.loads((out / "results.json").read_text())
    assert [row["model"] for row in rows] == ["pretrained", "+ SFT", "+ DPO"]
    for row, name in zip(rows, ("pretrain", "sft", "dpo"), strict=True):
        assert row["place"] == str(out / name)
        assert f"{row['perplexity']['window']['perplexity']:.2f}" in text
        model, tokenizer = open_model(row["place"], torch.device("cpu"))
        with torch.no_grad():
            answers = load_instructions(
                str(recipe.parent / "rows.jsonl"), tokenizer, 32, held_out=0.3
            ).validation
            nats = torch.cat([losses(model, *example) for example in answers])
            assert row["answer_perplexity"] == pytest.approx(math.exp(nats.mean().item()), rel=1e-5)
            sides = load_preferences(
                str(recipe.parent / "rows.jsonl"), tokenizer, 32, held_out=0.3
            ).validation
            means = [losses(model, *side).mean().item() for side in sides]
            right = [
                chosen < rejected for chosen, rejected in zip(means[::2], means[1::2], strict=True)
            ]
            assert row["prefers_chosen"] == pytest.approx(sum(right) / len(right))


def losses(model, ids, counted) -> torch.Tensor:
    ids = torch.from_numpy(ids).long()
    return F.cross_entropy(model.logits(ids[None, :-1])[0], ids[1:], reduction="none")[
        torch.from_numpy(counted[1:])
    ]


@pytest.mark.parametrize("stopped_in", ["pretrain", "sft", "dpo"])
def test_it_goes_on_where_it_stopped(stopped_in, recipe, whole, tmp_path, capsys, monkeypatch):
    part = tmp_path / "part"
    from fastlm.train import pipeline

    def stops(*arguments):
        return 130

    with monkeypatch.context() as m:
        m.setattr(pipeline, stopped_in, stops)
        assert main(["pipeline", str(recipe), "--out", str(part)]) == 130
    assert "goes on with the same command" in capsys.readouterr().out
    assert main(["pipeline", str(recipe), "--out", str(part)]) == 0
    a, b = (
        (checkpoint.locate(p / "dpo") / "model.safetensors").read_bytes() for p in (whole[0], part)
    )
    assert a == b
    capsys.readouterr()
    assert main(["pipeline", str(recipe), "--out", str(part)]) == 0
    assert capsys.readouterr().out.count("done: ") == 3


def test_other_options_are_refused_for_a_folder_that_is_begun(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "something").write_text("")
    assert main(["pipeline", str(recipe), "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    (out / "something").rename(out / "config.toml")
    assert main(["pipeline", str(recipe), "--out", str(out)]) == 2
    assert "begun with other options" in capsys.readouterr().err

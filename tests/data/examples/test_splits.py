"""What is held out, which files are which split, and sources that cannot be used."""

import json

import pytest

from fastlm.data.examples.load import load_instructions
from fastlm.errors import UserError


def test_held_out_prompts_are_not_in_training(gpt2, tmp_path):
    rows = [{"instruction": f"Say {n % 100}.", "output": f"{n}!"} for n in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, validation, report = load_instructions(str(tmp_path / "a.jsonl"), gpt2, 64, held_out=0.1)
    prompts = [{tuple(e.ids[~e.counted].tolist()) for e in part} for part in (train, validation)]
    assert prompts[0] & prompts[1] == set()
    assert len(train) + len(validation) == report.kept == 400
    assert 10 < len(validation) < 100


def test_folder_parts_are_splits(gpt2, tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"instruction": name, "output": "x"}))
    train, validation, report = load_instructions(str(tmp_path), gpt2, 64)
    assert (len(train), len(validation), report.read) == (1, 1, 2)
    assert "validation" in gpt2.decode(validation[0].ids)


def test_unusable_sources_give_one_line(gpt2, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "none").mkdir()
    for name in ("empty.jsonl", "a.txt", "none", "missing.jsonl"):
        with pytest.raises(UserError) as error:
            load_instructions(str(tmp_path / name), gpt2, 64)
        assert "\n" not in str(error.value)

"""One door: a name opens the same source, and a place names the same split, for all data."""

from __future__ import annotations

import json
import random
from itertools import cycle
from pathlib import Path

import pytest

from fastlm.data.catalogue import CATALOGUE, open_source
from fastlm.data.examples.load import load_instructions
from fastlm.data.source import split_named
from fastlm.data.text.documents import read_documents
from fastlm.data.text.prepare import prepare
from fastlm.errors import UserError
from fastlm.tokenizer import load_tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "red", "green", "blue", "one", "two", "three"]
SPLITS = {
    "train": [
        "train/a.jsonl",
        "train.jsonl",
        "other/a.jsonl",
        "a.jsonl",
        "more/test/a.jsonl",
        "trained.jsonl",
    ],
    "validation": [
        "validation/a.jsonl",
        "valid/deep/a.jsonl",
        "val.jsonl",
        "dev.part-2.jsonl",
        "Validation/a.jsonl",
    ],
    "test": ["test/a.jsonl", "test/deep/a.jsonl", "test.jsonl", "TEST/a.jsonl"],
}


def write(file: Path, mark: str, count: int = 60) -> None:
    """Records that are text and instructions at once; each holds the mark."""
    rng = random.Random(mark)
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{mark} {n} " + " ".join(rng.choices(WORDS, k=20)) for n in range(count)]
    records = [{"text": text, "instruction": text, "output": text} for text in texts]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def as_text(folder: Path, cache: Path) -> dict[str, str]:
    """What a pretraining run reads, by split."""
    tokenizer = load_tokenizer()
    data = prepare(str(folder), tokenizer, cache)
    return {split: tokenizer.decode(getattr(data, split)[:]) for split in ("train", "validation")}


def as_examples(folder: Path, cache: Path) -> dict[str, str]:
    """What a tuning run reads, by split."""
    tokenizer = load_tokenizer()
    examples = load_instructions(str(folder), tokenizer, 256, cache=cache)
    return {
        split: "".join(tokenizer.decode(sequence.ids) for sequence in getattr(examples, split))
        for split in ("train", "validation")
    }


@pytest.mark.parametrize("read", [as_text, as_examples])
@pytest.mark.parametrize(
    ("validation", "test"), list(zip(SPLITS["validation"], cycle(SPLITS["test"]), strict=False))
)
def test_a_place_names_the_same_split_by_both_doors(read, validation, test, tmp_path):
    folder = tmp_path / "data"
    for split, places in {
        "train": SPLITS["train"],
        "validation": [validation],
        "test": [test],
    }.items():
        for place in places:
            write(folder / place, f"{split}-marked")
    found = read(folder, tmp_path / "cache")
    assert found["train"].count("train-marked") >= 60 * len(SPLITS["train"])
    assert found["validation"].count("validation-marked") >= 60
    for split, text in found.items():
        assert {
            word for word in ("train-marked", "validation-marked", "test-marked") if word in text
        } == {f"{split}-marked"}


@pytest.mark.parametrize("read", [as_text, as_examples])
def test_a_test_split_alone_is_no_validation(read, tmp_path):
    """A share of the training data is held out: what validation chooses has not seen the test."""
    write(tmp_path / "data" / "train.jsonl", "train-marked", 300)
    write(tmp_path / "data" / "test.jsonl", "test-marked", 300)
    found = read(tmp_path / "data", tmp_path / "cache")
    assert "train-marked" in found["train"]
    assert "train-marked" in found["validation"]
    assert "test-marked" not in found["train"] + found["validation"]


@pytest.mark.parametrize("read", [as_text, as_examples])
def test_a_file_that_is_named_is_trained_on_whatever_its_name(read, tmp_path):
    write(tmp_path / "data" / "test.jsonl", "test-marked", 300)
    assert "test-marked" in read(tmp_path / "data" / "test.jsonl", tmp_path / "cache")["train"]


@pytest.mark.parametrize("read", [as_text, as_examples])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_without_training_data_nothing_begins(read, split, tmp_path):
    write(tmp_path / "data" / split / "a.jsonl", "x")
    with pytest.raises(UserError, match=f"it holds {split}; expected data to train on") as error:
        read(tmp_path / "data", tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_the_test_split_is_there_for_who_asks_for_it(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split / "a.jsonl", split, 3)
    source = open_source(str(tmp_path))
    assert [text.split()[0] for text in read_documents(source, "test")] == ["test"] * 3
    assert source.size_bytes == (tmp_path / "train" / "a.jsonl").stat().st_size


def test_split_names():
    assert {
        name: split_named(name)
        for name in ("validation", "valid", "val", "dev", "test", "train", "tests", "")
    } == {
        **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
        "test": "test",
        **dict.fromkeys(("train", "tests", ""), "train"),
    }


def test_a_fingerprint_follows_the_files_that_are_read_and_their_splits(tmp_path):
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "test.jsonl", "b")
    before = open_source(str(tmp_path)).fingerprint
    write(tmp_path / "test.jsonl", "c", 5)
    assert open_source(str(tmp_path)).fingerprint == before, "the test split is not read"
    (tmp_path / "a.jsonl").rename(tmp_path / "train.jsonl")
    renamed = open_source(str(tmp_path)).fingerprint
    (tmp_path / "train.jsonl").rename(tmp_path / "valid.jsonl")
    assert len({before, renamed, open_source(str(tmp_path)).fingerprint}) == 3


def test_plain_text_beside_examples_is_passed_over(tmp_path):
    write(tmp_path / "data" / "a.jsonl", "a")
    (tmp_path / "data" / "README.md").write_text("about this data")
    assert load_instructions(str(tmp_path / "data"), load_tokenizer(), 256).report.read == 60


@pytest.mark.parametrize(
    ("name", "kind"), [(name, entry.kind) for name, entry in CATALOGUE.items()]
)
def test_a_name_of_the_other_kind_is_refused_at_once_with_the_names_that_serve(name, kind):
    other = "examples" if kind == "text" else "text"
    with pytest.raises(
        UserError, match=f"it holds {kind}, not {other}; expected a path, "
    ) as error:
        open_source(name, other)
    listed = [n for n, entry in CATALOGUE.items() if entry.kind == other]
    assert all(n in str(error.value) for n in listed)


def test_a_folder_here_comes_before_a_name_of_the_hub_but_not_before_what_every_machine_has(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("tinystories", "python-stdlib"):
        write(tmp_path / name / "a.jsonl", "here", 3)
    assert [text.split()[0] for text in read_documents(open_source("tinystories"), "train")] == [
        "here"
    ] * 3
    assert not next(read_documents(open_source("python-stdlib"), "train")).startswith("here")


@pytest.mark.parametrize("kind", ["text", "examples"])
@pytest.mark.parametrize(
    "name",
    ["", " ", "unknown", "none.jsonl", "./none/here", "/none", "~/none", "a/b/c", "org/x.jsonl"],
)
def test_what_is_not_there_is_refused_without_asking_the_hub(name, kind, monkeypatch):
    monkeypatch.setattr("fastlm.data.hub.require_hub", None)
    with pytest.raises(UserError, match="expected a path") as error:
        open_source(name, kind)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [
        (["train", "test", "validation"], "validation"),
        (["train", "test"], "test"),
        (["train"], "train"),
        (["test"], "test"),
    ],
)
def test_an_evaluation_takes_held_out_text_where_there_is_some(splits, chosen, tmp_path):
    from fastlm.evaluation.evaluate import read_documents as read_for_evaluation

    for split in splits:
        write(tmp_path / split / "a.jsonl", split, 3)
    documents, _, _ = read_for_evaluation(str(tmp_path), "", 0)
    assert [text.split()[0] for text in documents] == [chosen] * 3
    named, _, _ = read_for_evaluation(str(tmp_path), splits[-1], 1)
    assert [text.split()[0] for text in named] == [splits[-1]]
    with pytest.raises(UserError, match="has no split 'other'; choose among"):
        read_for_evaluation(str(tmp_path), "other", 0)

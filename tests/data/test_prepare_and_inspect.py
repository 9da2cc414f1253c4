"""`fastlm data`: what is printed is true, and mistakes are one line."""

import json
import random

import numpy as np
import pytest

from fastlm.cli import main
from fastlm.data.prepare_and_inspect import histogram_svg, length_histogram
from fastlm.data.text.dedup import Duplicates, drop_duplicates
from fastlm.data.text.documents import Piece
from fastlm.data.text.tokens import Tokens, open_data
from fastlm.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "red", "green", "blue", "one", "two", "three"]


def write_rows(file, n_rows, seed=0):
    rng = random.Random(seed)
    rows = [
        {"text": f"row {n}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))}
        for n in range(n_rows)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_prepare_then_inspect(tmp_path, capsys):
    file = write_rows(tmp_path / "a.jsonl", 300)
    out = tmp_path / "out"
    assert main(["data", "prepare", str(file), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    data = open_data(out, verify=True)
    assert f"{len(data.train):,} tokens" in said
    assert f"fastlm pretrain --data {out}" in said
    assert main(["data", "prepare", str(file), "--out", str(out)]) == 0
    assert "already prepared" in capsys.readouterr().out
    assert main(["data", "inspect", str(out), "--picture", str(tmp_path / "a.svg")]) == 0
    said = capsys.readouterr().out
    assert "every size and sha256 is as in the manifest" in said
    assert "train document 0 (" in said
    assert "'row 0: " in said
    assert (tmp_path / "a.svg").read_text().count("<rect") > 2


def test_several_sources_make_a_mixture(tmp_path, capsys):
    files = [write_rows(tmp_path / f"{name}.jsonl", 100, seed) for seed, name in enumerate("ab")]
    assert main(["data", "prepare", *map(str, files), "--out", str(tmp_path / "out")]) == 0
    assert f'--data "{tmp_path}/out/a, {tmp_path}/out/b"' in capsys.readouterr().out
    open_data(tmp_path / "out" / "b")


def test_mistakes_are_one_line_and_code_two(tmp_path, capsys):
    file = write_rows(tmp_path / "a.jsonl", 100)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    assert main(["data", "prepare", str(file), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "train-00000.bin").open("r+b") as stream:
        stream.write(b"xx")
    capsys.readouterr()
    cases = [
        ["data"],
        ["data", "prepare", str(file)],
        ["data", "prepare", str(file), "--out", str(tmp_path / "other")],
        ["data", "prepare", str(file), "--out", str(tmp_path / "out"), "--dedup", "exact"],
        ["data", "prepare", str(file), "--out", str(tmp_path / "new"), "--workers", "-1"],
        ["data", "prepare", str(file), "--out", str(tmp_path / "new"), "--dedup", "perhaps"],
        ["data", "prepare", str(tmp_path / "none.txt"), "--out", str(tmp_path / "new")],
        ["data", "inspect", str(tmp_path / "none")],
        ["data", "inspect", str(tmp_path / "out")],
    ]
    for case in cases:
        assert main(case) == 2, case
        said = capsys.readouterr()
        assert said.err.startswith("fastlm: ")
        assert said.err.count("\n") == 1, said.err
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "other" / "notes").read_text() == "mine"


def test_histogram_counts_every_document():
    ends = np.cumsum([1, 2, 3, 4, 5, 8, 9, 1000])
    histogram = length_histogram(Tokens([np.zeros(ends[-1], np.uint16)], ends, 0))
    assert [h for h in histogram if h[2]] == [
        (1, 1, 1),
        (2, 2, 1),
        (3, 4, 2),
        (5, 8, 2),
        (9, 16, 1),
        (513, 1024, 1),
    ]
    assert "&lt;" in histogram_svg(histogram, "<x>")


def documents(texts):
    return [Piece(text, True) for text in texts]


def test_exact_duplicates_are_dropped_whatever_their_spacing():
    found = Duplicates("exact")
    kept = list(drop_duplicates(iter(documents(["A b c", "d", "a  B\nc", "d", "e"])), found))
    assert [piece.text for piece in kept] == ["A b c", "d", "e"]
    assert (found.exact, found.near) == (2, 0)


def test_near_duplicates_are_dropped_and_different_texts_kept():
    pytest.importorskip("datasketch", reason="near duplicates need the package datasketch")
    rng = random.Random(0)
    base = [" ".join(rng.choices([f"w{n}" for n in range(5000)], k=200)) for _ in range(20)]
    # 5 of 196 shingles differ.
    near = [text.replace(text.split()[100], "changed", 1) for text in base[:10]]
    found = Duplicates("near")
    kept = list(drop_duplicates(iter(documents(base + near + base[:3])), found))
    assert [piece.text for piece in kept] == base
    assert (found.exact, found.near) == (3, 10)


def test_unknown_ways_of_dropping_are_refused():
    with pytest.raises(UserError, match="duplicates"):
        Duplicates("some")

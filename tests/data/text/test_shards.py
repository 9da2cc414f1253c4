"""Shards: what is on disk, what is held out, what is refused."""

import json
import random

import numpy as np
import pytest

from fastlm.data.catalogue import open_source
from fastlm.data.stdlib import stdlib_held_out
from fastlm.data.text import shards
from fastlm.data.text.documents import read_pieces
from fastlm.data.text.manifest import Settings
from fastlm.data.text.prepare import prepare
from fastlm.data.text.tokens import Tokens, open_data, open_tokens, unigram_perplexity
from fastlm.errors import UserError
from fastlm.tokenizer import load_tokenizer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "12",
    "small",
    "green",
    "birds",
    "fly",
    "over",
    "there",
]


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def words(count, seed=0):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write_rows(file, n_rows=200, seed=0):
    file.write_text(
        "".join(json.dumps({"text": words(30, seed * 1000 + n)}) + "\n" for n in range(n_rows))
    )
    return file


def test_every_document_is_there_once_and_ends_with_end_of_text(gpt2, tmp_path):
    file = write_rows(tmp_path / "a.jsonl")
    data = prepare(str(file), gpt2, tmp_path / "cache")
    texts = []
    for tokens in (data.train, data.validation):
        for n in range(len(tokens.document_ends)):
            document = tokens.document(n)
            assert document[-1] == gpt2.eos_id
            assert gpt2.eos_id not in document[:-1]
            texts.append(gpt2.decode(document[:-1]))
        assert tokens.document_ends[-1] == len(tokens)
    assert sorted(texts) == sorted(
        json.loads(line)["text"] for line in file.read_text().splitlines()
    )


def test_a_long_text_keeps_its_ids_and_its_tail_is_validation(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.data.text.documents.PIECE_CHARS", 1000)
    file = tmp_path / "a.txt"
    file.write_text(words(20_000))
    data = prepare(str(file), gpt2, tmp_path / "cache")
    # Training is closed with an end of its own.
    ids = np.concatenate([data.train[:-1], data.validation[:]])
    assert ids.tolist() == [*gpt2.encode(file.read_text()), gpt2.eos_id]
    assert data.train[-1] == gpt2.eos_id
    assert 2000 <= len(data.validation) <= 0.11 * len(ids)


def test_second_run_reads_the_cache_and_a_changed_file_does_not(gpt2, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "a.jsonl")
    first = prepare(str(file), gpt2, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "encode_batches", None)  # would fail if anything were tokenised
        again = prepare(str(file), gpt2, tmp_path / "cache")
    assert again.folder == first.folder
    write_rows(file, 210)
    assert prepare(str(file), gpt2, tmp_path / "cache").folder != first.folder


def test_shards_are_one_array(gpt2, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "a.jsonl")
    whole = prepare(str(file), gpt2, tmp_path / "one").train
    monkeypatch.setattr("fastlm.data.text.writer.SHARD_TOKENS", 1000)
    parts = prepare(str(file), gpt2, tmp_path / "many").train
    assert len(parts.shards) > 3
    assert parts[:].tolist() == whole[:].tolist()
    for span in (slice(990, 2010), slice(-5, None), slice(3, 3), slice(0, 3000, 7), slice(5, 2)):
        assert parts[span].tolist() == whole[:][span].tolist()
    assert [parts[0], parts[999], parts[1000], parts[-1]] == whole[:][[0, 999, 1000, -1]].tolist()


def test_tail_top_up_across_shards_loses_nothing(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.data.text.writer.SHARD_TOKENS", 1000)
    file = tmp_path / "a.txt"
    file.write_text(words(20_000))
    data = prepare(str(file), gpt2, tmp_path / "cache")
    assert len(data.validation.shards) > 1
    ids = np.concatenate([data.train[:-1], data.validation[:]])
    assert ids.tolist() == [*gpt2.encode(file.read_text()), gpt2.eos_id]
    assert int(data.train.document_ends[-1]) == len(data.train)
    open_data(data.folder, gpt2, verify=True)


def test_given_validation_files_are_the_validation_split(gpt2, tmp_path):
    for name, seed in (("train", 1), ("validation", 2)):
        (tmp_path / "d" / name).mkdir(parents=True)
        write_rows(tmp_path / "d" / name / "x.jsonl", 60, seed)
    data = prepare(str(tmp_path / "d"), gpt2, tmp_path / "cache")
    rows = (tmp_path / "d" / "validation" / "x.jsonl").read_text().splitlines()
    expected = [i for row in rows for i in [*gpt2.encode(json.loads(row)["text"]), gpt2.eos_id]]
    assert data.validation[:].tolist() == expected


def test_line_ends_of_every_kind_are_one(gpt2, tmp_path, monkeypatch):
    # Line ends fall between blocks too.
    monkeypatch.setattr("fastlm.data.text.documents.PIECE_CHARS", 7)
    text = "one line\nand the next\n\nand é one more\n" * 100
    for name, end in (("unix", "\n"), ("windows", "\r\n"), ("old", "\r")):
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", end).encode())
        data = prepare(str(tmp_path / f"{name}.txt"), gpt2, tmp_path / name)
        assert np.concatenate([data.train[:-1], data.validation[:-1]]).tolist() == gpt2.encode(text)


def test_bytes_that_are_not_text_are_named(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.data.text.documents.PIECE_CHARS", 7)
    for place in (0, 1, 6, 7, 8, 2000):
        (tmp_path / "a.txt").write_bytes(
            ("é" * 5000).encode()[: 2 * place] + b"\xff" + b"more" * 500
        )
        with pytest.raises(UserError, match=rf"byte {2 * place}:"):
            prepare(str(tmp_path / "a.txt"), gpt2, tmp_path / "cache")


def test_marks_in_a_text_file_separate_documents(gpt2, tmp_path):
    stories = [words(40, n) for n in range(30)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(stories))
    data = prepare(str(tmp_path / "a.txt"), gpt2, tmp_path / "cache")
    got = [
        gpt2.decode(t.document(n)[:-1])
        for t in (data.train, data.validation)
        for n in range(len(t.document_ends))
    ]
    assert got == stories


def test_standard_library_holds_out_files_that_are_not_in_training(gpt2):
    source = open_source("python-stdlib")
    train, validation = (
        [p.text for p in read_pieces(source, split)] for split in ("train", "validation")
    )
    size = sum(map(len, validation)) / sum(map(len, train + validation))
    assert 0.005 < size < 0.06
    lines = {
        line.strip() for text in train for line in text.splitlines() if len(line.strip()) >= 12
    }
    for text in validation:
        own = [line.strip() for line in text.splitlines() if len(line.strip()) >= 12]
        assert sum(len(line) for line in own if line in lines) <= 0.2 * sum(map(len, own))


def test_near_duplicates_are_not_held_out():
    body = "".join(f"value_{n} = compute({n})\n" for n in range(50))
    files = {f"{n}.py": f"name_of_module = {n}\n{body}" for n in range(40)} | {
        f"own{n}.py": "".join(f"own_{n}_{m} = {m} + 1\n" for m in range(50)) for n in range(40)
    }
    held_out = stdlib_held_out(files, one_in=4)
    assert held_out
    assert all(name.startswith("own") for name in held_out)


def test_unigram_perplexity_by_hand():
    train = Tokens([np.array([0, 0, 1, 2], np.uint16)], np.array([4]), 2)
    validation = Tokens([np.array([0, 3], np.uint16)], np.array([2]), 2)
    # add-one over 4 ids: p = 3/8, 2/8, 2/8, 1/8
    assert unigram_perplexity(train.counts(4), validation.counts(4)) == pytest.approx(
        (8 / 3 * 8) ** 0.5
    )


def damage_size(folder):
    with (folder / "train-00000.bin").open("ab") as file:
        file.truncate(100)


def damage_bytes(folder):
    content = bytearray((folder / "train-00000.bin").read_bytes())
    content[50] ^= 1
    (folder / "train-00000.bin").write_bytes(content)


def damage_missing(folder):
    (folder / "validation.documents.bin").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_size, "truncated"),
        (damage_bytes, "sha256"),
        (damage_missing, "unreadable"),
        (damage_manifest, "unreadable"),
    ],
)
def test_damaged_shards_are_refused(gpt2, tmp_path, damage, message):
    data = prepare(str(write_rows(tmp_path / "a.jsonl")), gpt2, tmp_path / "cache")
    damage(data.folder)
    with pytest.raises(UserError, match=message) as error:
        open_data(data.folder, verify=True)
    assert "\n" not in str(error.value)


def test_shards_of_another_tokenizer_are_refused(gpt2, tmp_path):
    import dataclasses

    data = prepare(str(write_rows(tmp_path / "a.jsonl")), gpt2, tmp_path / "cache")
    with pytest.raises(UserError, match="same tokenizer"):
        open_tokens(data.folder, "train", dataclasses.replace(gpt2, hash="0" * 16))
    with pytest.raises(UserError, match="no split 'test'"):
        open_tokens(data.folder, "test")


def test_a_prepared_folder_is_a_source(gpt2, tmp_path):
    data = prepare(str(write_rows(tmp_path / "a.jsonl")), gpt2, tmp_path / "cache")
    assert prepare(str(data.folder), gpt2, tmp_path / "other").folder == data.folder


def test_bad_sources_give_one_line_and_leave_nothing(gpt2, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("two words")
    (tmp_path / "blank").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    (tmp_path / "x.csv").write_text("a,b\n" * 1000)
    (tmp_path / "x.parquet").write_text("no parquet")
    names = [
        "none.txt",
        "",
        "unknown-name",
        "./nothing",
        *(str(tmp_path / n) for n in ("empty.txt", "short.txt", "blank")),
    ]
    for name in [*names, *(str(tmp_path / n) for n in ("latin.txt", "x.csv", "x.parquet"))]:
        with pytest.raises(UserError) as error:
            prepare(name, gpt2, tmp_path / "cache")
        assert "\n" not in str(error.value), name
        assert len(str(error.value)) < 400
    assert not list((tmp_path / "cache").glob("*"))


def test_a_full_disk_is_one_line(gpt2, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        prepare(str(write_rows(tmp_path / "a.jsonl")), gpt2, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_rows_of_text_that_are_bad_are_named_or_counted(gpt2, tmp_path):
    good = [json.dumps({"text": words(30, n)}).encode() for n in range(60)]
    bad = [
        b'{"body": "x"}',
        b'{"text": 3}',
        b'{"text": " "}',
        b'{"text": "a", "text": "b"}',
        b'{"text": NaN}',
        b'"\xff"',
        b"[",
    ]
    file = tmp_path / "a.jsonl"
    for n, line in enumerate(bad):
        file.write_bytes(b"\n".join([*good[:20], line, *good[20:]]))
        with pytest.raises(UserError, match=r"a.jsonl:21: ") as error:
            prepare(str(file), gpt2, tmp_path / f"fail{n}")
        assert "\n" not in str(error.value)
    file.write_bytes(b"\n".join([*good, *bad]))
    data = prepare(str(file), gpt2, tmp_path / "skip", settings=Settings(on_bad_row="skip"))
    assert data.manifest.bad_rows.count == len(bad)
    assert [
        f":{61 + n}: " in example for n, example in enumerate(data.manifest.bad_rows.examples)
    ] == [True] * len(bad)
    assert sum(len(tokens.document_ends) for tokens in (data.train, data.validation)) == 60


def test_folders_of_mixed_files_are_read_in_order(gpt2, tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    texts = [words(30, n) for n in range(4)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": texts[0], "id": 1}]), folder / "a.parquet"
    )
    (folder / "b.txt").write_text(texts[1])
    (folder / "sub" / "c.md").write_text(texts[2])
    (folder / "z.jsonl").write_text(json.dumps({"body": texts[3]}))
    (folder / "notes.bin").write_bytes(b"not text")
    with pytest.raises(
        UserError, match=r"z.jsonl:1: field 'text': no such field \(its fields: body\)"
    ):
        prepare(str(folder), gpt2, tmp_path / "cache")
    (folder / "z.jsonl").write_text(json.dumps({"text": texts[3]}) * 1)
    (folder / "z2.jsonl").write_text(
        "\n".join(json.dumps({"text": words(30, n)}) for n in range(10, 20))
    )
    data = prepare(str(folder), gpt2, tmp_path / "cache")
    assert [gpt2.decode(data.train.document(n)[:-1]) for n in range(4)] == texts


def test_a_tokenizer_that_marks_word_starts_gets_whole_documents(tmp_path, monkeypatch):
    """With a prepended mark, parts of a text do not give the ids of the whole."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1} | {f"\u2581{word}": n for n, word in enumerate(WORDS, 2)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert not tokenizer.cut_safe
    monkeypatch.setattr("fastlm.data.text.documents.PIECE_CHARS", 100)
    (tmp_path / "a.txt").write_text(words(2000))
    data = prepare(str(tmp_path / "a.txt"), tokenizer, tmp_path / "cache")
    got = np.concatenate([data.train[:-1], data.validation[:]])
    assert got.tolist() == [*tokenizer.encode(words(2000)), tokenizer.eos_id]
    assert 0 not in got


def test_a_large_vocabulary_takes_wider_shards(gpt2, tmp_path):
    import dataclasses

    file = write_rows(tmp_path / "a.jsonl")
    wide = dataclasses.replace(gpt2, vocab_size=1 << 17, hash="f" * 16)
    data = [prepare(str(file), tokenizer, tmp_path / "cache").train for tokenizer in (gpt2, wide)]
    assert [part.shards[0].dtype.itemsize for part in data] == [2, 4]
    assert data[0][:].tolist() == data[1][:].tolist()

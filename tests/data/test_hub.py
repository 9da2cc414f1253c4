"""Hub data sets, with the hub replaced by rows in memory; and no hub at all."""

import socket
import time
from types import SimpleNamespace

import pytest

from fastlm.data import hub
from fastlm.data.catalogue import open_source
from fastlm.data.examples.load import load_preferences
from fastlm.data.hub import join_articles
from fastlm.data.text.documents import read_documents
from fastlm.data.text.manifest import Settings
from fastlm.data.text.prepare import prepare
from fastlm.errors import UserError
from fastlm.tokenizer import load_tokenizer

ARTICLES = [
    [" = Valkyria = \n", "\n", " One sentence . \n", " = = Section = = \n", " More = text . \n"],
    [" = Tower = \n", " Another one . \n", " = = = Deep = = = \n"],
]


class FakeHub:
    """`datasets.load_dataset` over rows by (repository, configuration, split); notes each call."""

    def __init__(self, monkeypatch, rows):
        import datasets
        import huggingface_hub

        self.rows, self.asked = rows, []
        monkeypatch.setattr(hub, "require_hub", lambda name: None)
        monkeypatch.setattr(
            huggingface_hub.HfApi, "dataset_info", lambda *a, **k: SimpleNamespace(sha="abc123")
        )
        monkeypatch.setattr(
            datasets, "get_dataset_split_names", lambda *a, **k: [key[2] for key in rows]
        )
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, repository, configuration=None, split=None, revision=None, streaming=False):
        import datasets

        self.asked.append((repository, configuration, split, revision, streaming))
        rows = self.rows[repository, configuration, split]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))


def test_wikitext_rows_become_articles_with_every_character():
    lines = [line for article in ARTICLES for line in article]
    assert list(join_articles(iter(lines))) == ["".join(article) for article in ARTICLES]


def test_a_hub_data_set_is_streamed_at_a_fixed_revision(monkeypatch, tmp_path):
    lines = [{"text": line} for _ in range(30) for article in ARTICLES for line in article]
    name = ("Salesforce/wikitext", "wikitext-2-raw-v1")
    fake = FakeHub(monkeypatch, {(*name, "train"): lines, (*name, "validation"): lines[:8]})
    gpt2 = load_tokenizer()
    data = prepare("wikitext-2", gpt2, tmp_path)
    assert len(data.train.document_ends) == 60
    assert gpt2.decode(data.validation[:-1]).count("Valkyria") == 1
    assert fake.asked == [(*name, "train", "abc123", True), (*name, "validation", "abc123", True)]
    again = prepare("wikitext-2", gpt2, tmp_path)
    assert (again.folder, len(fake.asked)) == (data.folder, 2)

    def no_hub(name):
        raise hub.HubOffline("offline")

    monkeypatch.setattr(hub, "require_hub", no_hub)
    # What is in the cache serves without the network.
    assert prepare("wikitext-2", gpt2, tmp_path).folder == data.folder
    with pytest.raises(UserError, match="offline"):
        prepare("wikitext-2", gpt2, tmp_path / "empty")


def test_bad_hub_rows_are_named(monkeypatch, tmp_path):
    FakeHub(
        monkeypatch,
        {("org/name", "en", "train"): [{"text": "fine words " * 50}] * 30 + [{"text": None}]},
    )
    with pytest.raises(UserError, match="train record 30"):
        prepare("org/name:en", load_tokenizer(), tmp_path)
    data = prepare("org/name:en", load_tokenizer(), tmp_path, settings=Settings(on_bad_row="skip"))
    assert data.manifest.bad_rows.count == 1


def test_preferences_come_from_the_hub_by_their_short_name(monkeypatch):
    def row(n):
        turns = f"\n\nHuman: {n}\n\nAssistant:"
        return {"chosen": f"{turns} b", "rejected": f"{turns} c"}

    rows = {
        ("Anthropic/hh-rlhf", None, split): [row(n) for n in range(200)]
        for split in ("train", "test")
    }
    fake = FakeHub(monkeypatch, rows)
    examples = load_preferences("hh-rlhf", load_tokenizer(), 64)
    # Of the training split a share is held out.
    assert len(examples.train) + len(examples.validation) == 400
    assert 4 <= len(examples.validation) <= 40
    # The test split stays unread.
    assert [asked[::2] for asked in fake.asked] == [("Anthropic/hh-rlhf", "train", True)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["train", "test", "validation"],
            {"train": ["train"], "test": ["test"], "validation": ["validation"]},
        ),
        (["train", "dev", "val"], {"train": ["train"], "validation": ["dev", "val"]}),
        (["train", "test", "unsupervised"], {"train": ["train"], "test": ["test"]}),
    ],
)
def test_the_hub_s_splits_are_ours_by_name(monkeypatch, names, expected):
    FakeHub(monkeypatch, {("org/name", None, name): [{"text": f"from {name}"}] for name in names})
    source = open_source("org/name")
    texts = {
        split: [text.removeprefix("from ") for text in read_documents(source, split)]
        for split in source.splits
    }
    assert texts == expected


def test_what_was_prepared_with_another_choice_of_validation_is_not_taken_for_the_same(monkeypatch):
    prints = []
    for names in (
        ["train"],
        ["train", "validation"],
        ["train", "test"],
        ["train", "val"],
        ["train", "dev", "test"],
    ):
        with monkeypatch.context() as patch:
            FakeHub(patch, {("org/name", None, name): [] for name in names})
            prints.append(open_source("org/name").fingerprint)
    # These are validated on what older versions chose.
    assert prints[0] == prints[1] == prints[4] == "abc123"
    assert len(set(prints)) == 3


def test_offline_is_one_line_at_once(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("wikitext-103", "org/name"):
        start = time.monotonic()
        with pytest.raises(UserError, match="does not answer") as error:
            prepare(name, load_tokenizer(), tmp_path)
        assert time.monotonic() - start < 30
        assert "python-stdlib" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_hub_that_never_answers_does_not_hold_us(monkeypatch):
    import urllib.request

    monkeypatch.setattr(hub, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: time.sleep(60))
    start = time.monotonic()
    with pytest.raises(UserError, match="does not answer"):
        open_source("tinystories")
    assert time.monotonic() - start < 30

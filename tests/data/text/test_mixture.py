"""Mixtures and shuffled documents: proportions and order follow from the position alone."""

import json
import random

import numpy as np
import pytest
import torch

from fastlm.data import IGNORED
from fastlm.data.text.batches import isolate_documents, row_batch
from fastlm.data.text.mixture import Mixture, draw, parse_mixture, quotas
from fastlm.data.text.prepare import prepare
from fastlm.data.text.tokens import ShuffledTokens, Tokens, unigram_perplexity
from fastlm.errors import UserError
from fastlm.tokenizer import load_tokenizer


def make_tokens(count, first=0, document=10, name="t"):
    return Tokens(
        [np.arange(first, first + count, dtype=np.uint32)],
        np.arange(document, count + 1, document),
        0,
        name,
    )


def test_every_prefix_has_the_stated_proportions():
    for weights in ([400, 25], [1, 1, 1], [7, 3, 90, 11], [5]):
        total = sum(weights)
        seen = [0] * len(weights)
        for position, (source, place) in enumerate(draw(0, 2 * total, weights)):
            assert [(source, place)] == list(draw(position, 1, weights))
            assert place == seen[source]
            seen[source] += 1
            assert seen == quotas(position + 1, weights)
            assert all(
                abs(s - (position + 1) * w / total) <= len(weights) / 2
                for s, w in zip(seen, weights, strict=True)
            )
        assert seen == [2 * w for w in weights]


def test_a_mixture_draws_epochs_of_each_source():
    small, large = make_tokens(161, 0), make_tokens(1601, 1000)
    mixture = Mixture((small, large), (4.0, 0.25))
    assert mixture.weights(16) == [40, 25]
    x, y = row_batch(mixture, 0, 65, 16, seed=1)
    assert (y - x == 1).all()
    from_small = x[:, 0] < 1000
    assert int(from_small.sum()) == 40
    targets, times = np.unique(y[from_small].numpy(), return_counts=True)
    assert (len(targets), set(times.tolist())) == (160, {4})  # four epochs of every target
    assert len(np.unique(y[~from_small].numpy())) == 25 * 16  # a quarter epoch, nothing twice
    assert mixture.tokens_drawn(65, 16) == {"t": 25 * 16} or mixture.rows_drawn(65, 16) == [40, 25]
    assert mixture[150:170].tolist() == [*range(150, 161), *range(1000, 1009)]
    resumed, _ = row_batch(mixture, 20, 45, 16, seed=1)
    assert torch.equal(resumed, x[20:])


def sources():
    """Every kind of token source, and a mixture of mixtures."""
    small = make_tokens(161, 0, name="small")
    large = make_tokens(1601, 1000, name="large")
    mixture = Mixture((small, large), (4.0, 0.25))
    return [
        small,
        ShuffledTokens(make_tokens(1600, 1000, name="large"), 3),
        mixture,
        Mixture((mixture, make_tokens(321, 5000, name="third")), (1.0, 2.0)),
    ]


@pytest.mark.parametrize("source", sources())
def test_every_source_of_tokens_keeps_the_same_promises(source):
    seq_len = 16
    n_rows = source.rows(seq_len)
    rows = source.rows_at(0, 2 * n_rows, seq_len, seed=1)
    assert rows.shape == (2 * n_rows, seq_len + 1)
    assert rows.dtype == np.int64
    one_by_one = [source.rows_at(position, 1, seq_len, seed=1)[0] for position in range(2 * n_rows)]
    assert (rows == one_by_one).all()
    for position in (0, 1, n_rows, 2 * n_rows):
        drawn = source.tokens_drawn(position, seq_len)
        assert sum(drawn.values()) == position * seq_len
        first = rows[:position, 0]
        for name, ids in (
            ("small", range(1000)),
            ("large", range(1000, 3000)),
            ("third", range(5000, 6000)),
        ):
            assert drawn.get(name, 0) == seq_len * np.isin(first, ids).sum()
    assert source.counts(6000).shape == (6000,)
    assert set(np.flatnonzero(source.counts(6000))) == set(source[:].tolist())
    assert len(source[:]) == len(source)
    assert (source[3:40] == source[:][3:40]).all()
    with pytest.raises(UserError, match="longer than the data"):
        source.rows(5000)


def test_counts_of_a_mixture_weigh_each_text_by_its_epochs():
    a = Tokens([np.array([0, 1, 1], np.uint16)], np.array([3]), 0)
    b = Tokens([np.array([2], np.uint16), np.array([1], np.uint16)], np.array([2]), 0)
    assert Mixture((a, b), (2.0, 0.5)).counts(4).tolist() == [2, 4.5, 0.5, 0]
    assert Tokens([], np.array([], np.int64), 0).counts(3).tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="the vocabulary has 2"):
        b.counts(2)


def test_mixture_text_is_parsed_or_refused():
    assert parse_mixture("wikitext-103:4, tinystories:0.25") == [
        ("wikitext-103", 4.0),
        ("tinystories", 0.25),
    ]
    assert parse_mixture("org/name:config") == [("org/name:config", 1.0)]
    assert parse_mixture("org/name:config:2,./a.txt") == [
        ("org/name:config", 2.0),
        ("./a.txt", 1.0),
    ]
    for text in ("a:0, b:1", "a,,b", "a, a:2"):
        with pytest.raises(UserError, match="mixture"):
            parse_mixture(text)


def test_prepare_takes_a_mixture(tmp_path):
    gpt2 = load_tokenizer("gpt2")
    rng = random.Random(0)
    for name, words in (("a", "red green blue"), ("b", "one two three")):
        rows = [" ".join(rng.choice(words.split()) for _ in range(30)) for _ in range(100)]
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": row}) for row in rows)
        )
    data = prepare(f"{tmp_path}/a.jsonl:2, {tmp_path}/b.jsonl", gpt2, tmp_path / "cache")
    x, _ = row_batch(data.train, 0, 30, 32, seed=0)
    is_a = ["red" in gpt2.decode(row.tolist()) for row in x]
    assert sum(is_a) == data.train.rows_drawn(30, 32)[0] == 20
    text = gpt2.decode(data.validation[:])
    assert "red" in text
    assert "one" in text
    assert (
        1
        < unigram_perplexity(
            data.train.counts(gpt2.vocab_size), data.validation.counts(gpt2.vocab_size)
        )
        < 1000
    )


def test_shuffled_documents_are_the_same_documents():
    rng = random.Random(3)
    ends = np.cumsum([rng.randint(1, 30) for _ in range(200)])
    tokens = Tokens([np.arange(ends[-1], dtype=np.uint32)], ends, 0)
    shuffled = ShuffledTokens(tokens, seed=5)
    assert len(shuffled) == len(tokens)
    documents = [[t.document(n).tolist() for n in range(200)] for t in (tokens, shuffled)]
    assert documents[0] != documents[1]
    assert sorted(documents[0]) == sorted(documents[1])
    whole = [i for document in documents[1] for i in document]
    for start, stop in ((0, 5), (17, 400), (len(tokens) - 3, len(tokens)), (9, 9)):
        assert shuffled[start:stop].tolist() == whole[start:stop]
    assert ShuffledTokens(tokens, seed=5)[:].tolist() == whole
    assert ShuffledTokens(tokens, seed=6)[:].tolist() != whole
    x, y = row_batch(shuffled, 3, 4, 16, seed=0)
    assert x.shape == y.shape == (4, 16)


def test_isolated_documents_have_their_boundaries():
    x = torch.tensor([[5, 6, 0, 7, 8, 9], [1, 0, 0, 2, 3, 0]])
    y = torch.tensor([[6, 0, 7, 8, 9, 4], [0, 0, 2, 3, 0, 8]])
    y, positions, cu_seqlens, max_seqlen = isolate_documents(x, y, eos_id=0, room=7)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 2]]
    assert cu_seqlens.tolist() == [0, 3, 6, 8, 9, 12, 12, 12]
    assert cu_seqlens.dtype == torch.int32
    assert max_seqlen == 6
    assert y.tolist() == [[6, 0, IGNORED, 8, 9, 4], [0, IGNORED, IGNORED, 3, 0, IGNORED]]
    # None is dropped.
    assert isolate_documents(x, y, 0, room=3)[2].tolist() == [
        0,
        3,
        6,
        8,
        9,
        12,
        12,
        12,
        12,
    ]


def test_no_batch_of_a_run_holds_more_documents_than_their_ends_tell():
    """Against the tokens themselves: five epochs, each with a phase of its own, of two sources."""
    rng = random.Random(1)
    parts = []
    for longest in (9, 60):
        ends = np.cumsum([rng.randint(1, longest) for _ in range(150)])
        ids = np.ones(ends[-1], np.uint16)
        ids[ends - 1] = 0
        parts.append(Tokens([ids], ends, 0))
    sources = (parts[0], Mixture(tuple(parts), (1.0, 0.5)))
    for tokens in sources:
        rows = range(7, 7 + 6 * (5 * len(tokens) // 144), 6)
        bound = tokens.most_documents(rows, 24, seed=2)
        found = []
        for position in rows:
            x, y = row_batch(tokens, position, 6, 24, seed=2)
            found.append(isolate_documents(x, y, 0, bound)[2])
        assert {len(cu_seqlens) for cu_seqlens in found} == {bound + 1}
        most = max(len(cu_seqlens.unique()) - 1 for cu_seqlens in found)
        assert most <= bound <= 2 * most


def test_isolated_documents_do_not_see_each_other():
    from fastlm.config import ModelConfig
    from fastlm.model import Transformer

    torch.manual_seed(0)
    shape = {
        "vocab_size": 60,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "ffn_dim": 64,
        "max_seq_len": 32,
    }
    model = Transformer(ModelConfig(**shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randint(1, 60, (2, 32))
    x[0, [7, 20]] = 0
    x[1, 13] = 0
    _, positions, cu_seqlens, max_seqlen = isolate_documents(x, x.clone(), eos_id=0, room=5)
    with torch.no_grad():
        packed = model.logits(x, positions=positions, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        for row, start, stop in ((0, 0, 8), (0, 8, 21), (0, 21, 32), (1, 0, 14), (1, 14, 32)):
            alone = model.logits(x[row : row + 1, start:stop])[0]
            torch.testing.assert_close(packed[row, start:stop], alone, rtol=1e-4, atol=1e-4)

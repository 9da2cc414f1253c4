"""Packed rows: full, isolated, each example once an epoch."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import IGNORED
from fastlm.data.examples.load import load_instructions, load_preferences, pack_examples
from fastlm.data.examples.packing import (
    best_fit_decreasing,
    common_slots,
    lay_out,
    pack,
    packed_batch,
    packed_epoch,
)
from fastlm.errors import UserError
from fastlm.tokenizer import load_tokenizer

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def brute_force(sizes, capacity):
    bins, free = [], []
    for index in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        fitting = [(free[b], b) for b in range(len(bins)) if free[b] >= sizes[index]]
        if fitting:
            chosen = min(fitting)[1]
        else:
            bins.append([])
            free.append(capacity)
            chosen = len(bins) - 1
        bins[chosen].append(index)
        free[chosen] -= sizes[index]
    return bins


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80))
def test_best_fit_decreasing_is_that(sizes):
    bins = best_fit_decreasing(sizes, 50)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in b) <= 50 for b in bins)
    # Equally full bins may be chosen either way; the filling is the same.
    filling = [
        sorted(sum(sizes[i] for i in b) for b in part) for part in (bins, brute_force(sizes, 50))
    ]
    assert filling[0] == filling[1]


def test_packing_many_is_full():
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(5, 0.8, 10_000), 5, 1024).astype(int)
    bins = best_fit_decreasing(sizes, 1024)
    assert sizes.sum() / (len(bins) * 1024) > 0.99
    with pytest.raises(ValueError, match="capacity"):
        best_fit_decreasing([5, 2000], 1024)


def make_sequences(count, seed=0, longest=30):
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        n, start = rng.randint(2, longest), rng.randint(1, longest)
        made.append(
            (
                np.array([rng.randint(1, 99) for _ in range(n)], np.int32),
                np.arange(n) >= min(start, n - 1),
            )
        )
    return made


def test_a_batch_holds_each_example_with_its_targets_and_boundaries():
    sequences = make_sequences(40)
    packed = pack(sequences, 32)
    batch = lay_out(packed, range(len(packed)))
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == batch.x.numel()
    assert all(row * 32 in bounds for row in range(len(packed)))
    found = []
    x, y, positions, unit = (t.flatten() for t in (batch.x, batch.y, batch.positions, batch.unit))
    for start, stop in pairwise(bounds):
        units = set(unit[start:stop].tolist()) - {-1}
        assert positions[start:stop].tolist() == (
            list(range(stop - start)) if units else [0] * (stop - start)
        )
        if units:
            assert len(units) == 1
            found.append((x[start:stop].tolist(), y[start:stop].tolist()))
        else:
            assert (y[start:stop] == IGNORED).all()
    expected = [(i[:-1].tolist(), np.where(c[1:], i[1:], IGNORED).tolist()) for i, c in sequences]
    assert sorted(found) == sorted(expected)
    assert batch.real == packed.real_slots == sum(len(i) - 1 for i, _ in sequences)


def test_every_example_once_an_epoch_in_an_order_that_resumes():
    packed = pack(make_sequences(100), 32)
    whole = [packed_batch(packed, n, 1, seed=3).x.tolist() for n in range(2 * len(packed))]
    assert (
        sorted(whole[: len(packed)])
        == sorted(whole[len(packed) :])
        == sorted(lay_out(packed, [r]).x.tolist() for r in range(len(packed)))
    )
    assert whole[: len(packed)] != whole[len(packed) :]
    resumed = packed_batch(packed, 5, 8, seed=3)
    assert resumed.x.tolist() == [row for part in whole[5:13] for row in part]
    batches = list(packed_epoch(packed, 7))
    assert sum(int((b.y != IGNORED).sum()) for b in batches) == sum(
        int(c[1:].sum()) for _, c in make_sequences(100)
    )
    assert {tuple(b.x.shape) for b in batches} == {(7, 32)}
    # One shape: a compiled model is not compiled again.
    assert len({b.cu_seqlens.shape for b in batches}) == 1


def test_pairs_share_a_row_and_their_units_say_which_side():
    packed = pack(make_sequences(40, longest=16), 32, group=2)
    batch = packed_batch(packed, 0, len(packed), seed=0)
    assert batch.units == 40
    rows_of = [set((batch.unit == u).nonzero()[:, 0].tolist()) for u in range(40)]
    assert all(rows_of[2 * p] == rows_of[2 * p + 1] for p in range(20))


def test_an_example_longer_than_the_row_is_refused():
    with pytest.raises(UserError, match="lengthen the row"):
        pack(make_sequences(5), 10)
    with pytest.raises(UserError, match="no example"):
        pack([], 10)


@pytest.fixture(scope="module")
def model():
    from fastlm.config import ModelConfig
    from fastlm.model import Transformer

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=100, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, max_seq_len=64
    )
    model = Transformer(config).eval()
    for parameter in model.parameters():
        # The usual start has zeros, which would hide everything.
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def packed_logits(model, batch):
    with torch.no_grad():
        return model.logits(batch.x, **batch.layout())


def make_pairs(count, seed=0):
    """Pairs that share a prompt of 1 to 20 ids; some answers begin alike, some pairs do not."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [rng.randint(1, 99) for _ in range(rng.randint(1, 20))]
        alike = [rng.randint(1, 99)] * rng.randint(0, 3)
        for side in range(2):
            other = [100 - prompt[0], *prompt[1:]] if rng.random() < 0.1 else prompt
            ids = np.array(other + alike + [side] * rng.randint(1, 12), np.int32)
            made.append((ids, np.arange(len(ids)) >= len(prompt)))
    return made


def test_every_slot_knows_where_it_stands_among_the_keys():
    packed = pack(make_pairs(12), 64, group=2, share=True)
    batch = lay_out(packed, range(len(packed)))
    cu_seqlens_k, keys, places = batch.sharing
    seen = keys[: cu_seqlens_k[-1]].tolist()
    for slot, found in enumerate(places.tolist()):
        assert sorted(place for place in found if place < len(keys) - 1) == [
            n for n, key in enumerate(seen) if key == slot
        ]
    assert len(keys) > cu_seqlens_k[-1] > batch.x.numel()  # some prompts are seen by both answers


@pytest.mark.parametrize("count", [1, 3, 40])
def test_all_batches_of_a_run_have_one_shape_that_holds_the_fullest(count):
    """Whatever rows of whatever epochs meet, of training and of held-out rows."""
    train = pack(make_pairs(40), 64, group=2, share=True)
    held_out = pack(make_pairs(7, seed=1), 64, group=2, share=True)
    rooms = [rows.room(count) for rows in (train, held_out)]
    room = max(segments for segments, _ in rooms), max(keys for _, keys in rooms)
    batches = [packed_batch(train, position, count, 0, room) for position in range(0, 60, count)]
    batches += packed_epoch(held_out, count, room)
    assert (
        {len(b.cu_seqlens) for b in batches}
        == {len(b.sharing[0]) for b in batches}
        == {room[0] + 1}
    )
    assert {len(b.sharing[1]) for b in batches} == {room[1]}
    most = max(len(b.cu_seqlens.unique()) - 1 for b in batches)
    assert most <= room[0] <= 2 * most


def test_what_a_pair_has_in_common_is_what_its_ids_say():
    for a, b in zip(*[iter(make_pairs(60))] * 2, strict=True):
        n = common_slots([a, b])
        equal = next(i for i in range(99) if i >= min(len(a[0]), len(b[0])) or a[0][i] != b[0][i])
        first_counted = min(int(a[1].argmax()), int(b[1].argmax()))
        assert n == min(equal, first_counted - 1)


def test_a_shared_prompt_leaves_every_logprob_and_gradient_as_it_was(model):
    pairs, found = make_pairs(12), []
    for share in (False, True):
        packed = pack(pairs, 64, group=2, share=share)
        assert packed.real_slots == sum(lay_out(packed, [row]).real for row in range(len(packed)))
        batch = lay_out(packed, range(len(packed)))
        logps = model.logprobs(batch.x, batch.y, **batch.layout())
        assert batch.counted <= len(packed) * packed.most_counted
        of_unit = {}
        for number, row in enumerate(packed.rows):
            units = batch.unit[number][batch.unit[number] >= 0].unique().tolist()
            of_unit |= dict(
                zip([2 * e + side for e in row for side in range(2)], units, strict=True)
            )
        sums = torch.stack([logps[batch.unit == of_unit[n]].sum() for n in range(24)])
        upstream = torch.linspace(-1, 1, 24)
        found.append(
            (packed, sums, torch.autograd.grad((sums * upstream).sum(), list(model.parameters())))
        )
    (plain, sums, grads), (shared, shared_sums, shared_grads) = found
    assert shared.real_slots < 0.8 * plain.real_slots
    torch.testing.assert_close(shared_sums, sums, rtol=1e-5, atol=1e-5)
    for a, b in zip(shared_grads, grads, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_answers_that_share_a_prompt_cannot_see_each_other(model):
    packed = pack(make_pairs(6), 64, group=2, share=True)
    batch = lay_out(packed, range(len(packed)))
    before = packed_logits(model, batch)
    chosen, rejected = ((batch.unit >= 0) & (batch.unit % 2 == side) for side in range(2))
    after = packed_logits(
        model, batch._replace(x=torch.where(rejected, (batch.x + 1) % 100, batch.x))
    )
    assert torch.equal(before[chosen], after[chosen])
    assert not torch.equal(before[rejected], after[rejected])


def test_packed_loss_equals_per_document_loss(model):
    sequences = make_sequences(30)
    packed = pack(sequences, 64)
    batch = lay_out(packed, range(len(packed)))
    got = F.cross_entropy(
        packed_logits(model, batch).flatten(0, 1),
        batch.y.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    alone = []
    for ids, counted in sequences:
        ids = torch.from_numpy(ids).long()
        with torch.no_grad():
            losses = F.cross_entropy(model.logits(ids[None, :-1])[0], ids[1:], reduction="none")
        alone.append(losses[torch.from_numpy(counted[1:])])
    alone = torch.cat(alone)
    assert (batch.y != IGNORED).sum() == len(alone)
    torch.testing.assert_close(got.sum(), alone.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got[batch.y.flatten() != IGNORED].sort().values, alone.sort().values, rtol=1e-5, atol=1e-5
    )


def test_changing_one_packed_document_leaves_the_others_bitwise(model):
    packed = pack(make_sequences(6, longest=20), 64)
    row = max(range(len(packed)), key=lambda n: len(packed.rows[n]))
    assert len(packed.rows[row]) >= 2
    batch = lay_out(packed, [row])
    before = packed_logits(model, batch)
    start, stop = batch.cu_seqlens[0:2].tolist()
    batch.x[0, start:stop] = (batch.x[0, start:stop] + 1) % 100
    after = packed_logits(model, batch)
    assert (before[:, start:stop] != after[:, start:stop]).any(-1).all()
    assert torch.equal(before[:, stop:], after[:, stop:])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sibling folder shared/data is not here")
def test_real_instructions_and_pairs_fill_their_rows():
    gpt2 = load_tokenizer("gpt2")
    instructions = load_instructions(
        str(SHARED / "code_alpaca_2k.jsonl"), gpt2, 512, on_bad_row="skip"
    )
    packed, validation = pack_examples(instructions, 512)
    assert instructions.report.read == 2017
    assert (
        instructions.report.kept + instructions.report.dropped + instructions.report.bad.count
        == 2017
    )
    assert packed.real_share >= 0.95
    assert validation is not None
    pairs = load_preferences(str(SHARED / "alpaca_eval_pairs.jsonl"), gpt2, 512)
    # Rows of two pairs or more: 1,024 would leave 11% empty.
    packed, _ = pack_examples(pairs, 2048, group=2)
    assert pairs.report.read == 802
    assert packed.real_share >= 0.95
    shared, _ = pack_examples(pairs, 2048, group=2, share=True)
    assert shared.real_share >= 0.95
    assert shared.real_slots < 0.95 * packed.real_slots

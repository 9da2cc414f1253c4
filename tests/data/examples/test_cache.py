"""Encoded examples kept in a file: the same again, for every setting, whatever happens to it."""

import json

import numpy as np
import pytest

from fastlm.data.examples.load import load_instructions


def test_the_cache_gives_the_same_examples_and_follows_every_setting(gpt2, tmp_path, monkeypatch):
    rows = [{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(50)] + [
        {"instruction": "x", "output": ""}
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def load(max_len=64, **settings):
        return load_instructions(
            str(tmp_path / "a.jsonl"),
            gpt2,
            max_len,
            on_bad_row="skip",
            cache=tmp_path / "c",
            **settings,
        )

    def plain(examples):
        parts = [[(e.ids.tolist(), e.counted.tolist()) for e in part] for part in examples[:2]]
        return parts, examples.report.line()

    first = load()
    with monkeypatch.context() as patch:
        # Would fail if anything were encoded.
        patch.setattr("fastlm.data.examples.load.encode_dialogue", None)
        assert plain(load()) == plain(first)
    file = next((tmp_path / "c").iterdir())
    file.write_bytes(file.read_bytes()[:-20])
    assert plain(load()) == plain(first)
    load(32)
    load(template="chatml")
    load(held_out=0.5)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    assert load().report.read == 50
    assert len(list((tmp_path / "c").iterdir())) == 5


@pytest.fixture
def cached(gpt2, tmp_path):
    """A cache file, and what loads the examples it belongs to."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{n}", "completion": f" a {n}"}) + "\n" for n in range(40))
    )

    def load():
        return load_instructions(str(tmp_path / "a.jsonl"), gpt2, 16, cache=tmp_path / "c")

    load()
    return next((tmp_path / "c").glob("*.npz")), load


def same(a, b):
    ids = [[s.ids.tolist() for s in (*x.train, *x.validation)] for x in (a, b)]
    counted = [[s.counted.tolist() for s in (*x.train, *x.validation)] for x in (a, b)]
    return (
        ids[0] == ids[1]
        and counted[0] == counted[1]
        and a.report == b.report
        and len(a.train) == len(b.train)
    )


def test_a_cache_damaged_at_any_place_is_made_again(cached):
    file, load = cached
    whole, content = load(), file.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*range(0, len(content), 61), *range(300)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        assert same(load(), whole), place
    for length in range(0, len(content), 97):
        file.write_bytes(content[:length])
        assert same(load(), whole), length


def written(**changes):
    """A cache file's arrays with some replaced, and fields of its report."""
    bad = {"policy": "fail", "count": 0, "examples": []}
    counts = {"read": 2, "kept": 2, "prompts_truncated": 0, "responses_truncated": 0, "dropped": 0}
    report = {
        "source": "x",
        **counts,
        "template": "none",
        "bad": bad,
        "train_sequences": 1,
    } | changes.pop("report", {})
    arrays = {
        "ids": np.arange(4, dtype=np.int32),
        "counted": np.ones(4, bool),
        "ends": np.array([2, 4]),
    }
    return arrays | {"report": np.frombuffer(json.dumps(report).encode(), np.uint8)} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": np.arange(4.0)},
        {"ids": np.arange(5, dtype=np.int32)},
        {"ids": np.zeros((2, 2), np.int32)},
        {"counted": np.ones(4, np.int8)},
        {"ends": np.array([4, 2])},
        {"ends": np.array([2, 400])},
        {"ends": np.array([-1, 4])},
        {"ends": np.array([], np.int64)},
        {"ends": np.array([2.0, 4.0])},
        {"report": {"train_sequences": "1"}},
        {"report": {"train_sequences": -1}},
        {"report": {"read": None}},
        {"report": {"bad": 5}},
        {"report": {"bad": {"policy": "perhaps", "count": 0, "examples": []}}},
        {"report": {"bad": {"policy": "fail", "count": 0, "examples": [1]}}},
    ],
)
def test_a_cache_of_another_form_is_made_again(cached, changes):
    file, load = cached
    whole = load()
    np.savez(file, **written())
    assert load().report.source == "x"  # without the changes it is of the right form
    np.savez(file, **written(**changes))
    assert same(load(), whole)

"""Rows of every form give the same dialogues and pairs; a bad row is named by its line."""

import json

import pytest
from helpers.examples import counted_text

from fastlm.data.examples.formats import Message, read_preference
from fastlm.data.examples.load import load_instructions, load_preferences
from fastlm.data.examples.templates import encode_dialogue
from fastlm.errors import UserError

CHAT = [
    ("system", "Be brief."),
    ("user", "Hi <|endoftext|> there"),
    ("assistant", "Hello."),
    ("user", "Bye"),
    ("assistant", "So long\n"),
]
HH = "\n\nHuman: What is\n\n2+2?\n\nAssistant: Four.\n\nHuman: And 3+3?\n\nAssistant:"


def test_hh_is_split_at_the_last_assistant_turn(gpt2):
    pair = read_preference({"chosen": HH + " Six.", "rejected": HH + " Seven."})
    assert pair.chosen.raw == (HH, " Six.")
    assert [m.role for m in pair.chosen.messages] == ["user", "assistant", "user", "assistant"]
    assert pair.rejected.messages[-1].content == "Seven."
    assert pair.chosen.messages[0].content == "What is\n\n2+2?"
    assert counted_text(encode_dialogue(pair.chosen, gpt2), gpt2) == [" Six.<|endoftext|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [{"role": "user", "content": "Q"}], "chosen": "A", "rejected": "B"},
        {
            "prompt": "Q",
            "chosen": [{"role": "assistant", "content": "A"}],
            "rejected": [{"role": "assistant", "content": "B"}],
        },
        {
            "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
        },
    ],
)
def test_preferences_in_any_form_are_the_same_pair(row):
    pair = read_preference(row)
    expected = (
        [Message("user", "Q"), Message("assistant", "A")],
        [Message("user", "Q"), Message("assistant", "B")],
    )
    assert (pair.chosen.messages, pair.rejected.messages) == expected


BAD_INSTRUCTIONS = [
    ('{"instruction": "a"}', "no field 'response'"),
    ('{"instruction": "a", "output": ""}', "'output' is empty"),
    ('{"instruction": "a", "output": 3}', "expected text, got int"),
    ('{"instruction": "a", "output": null}', "got nothing"),
    ('{"instruction": "a", "output": "b", "output": "c"}', "given twice"),
    ('{"instruction": "a", "output": NaN}', "NaN is not JSON"),
    ('{"text": "a"}', "expected the fields"),
    ('["a"]', "expected a JSON object, got list"),
    ('{"instruction": ', "not JSON"),
    (b'{"instruction": "caf\xe9", "output": "b"}', "not UTF-8"),
    ('{"messages": []}', "got nothing"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "ends with a user turn"),
    (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}',
        "empty",
    ),
    ("[" * 100_000, "nested too deeply|recursion"),
]
BAD_PREFERENCES = [
    ('{"prompt": "a", "chosen": "b"}', "no field 'rejected'"),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "are the same"),
    ('{"prompt": "a", "chosen": "b", "rejected": ""}', "is empty"),
    (json.dumps({"chosen": HH, "rejected": HH + " x"}), "response is empty"),
    (
        json.dumps({"chosen": HH + " x\n\nHuman: y", "rejected": HH + " x"}),
        "ends with a Human turn",
    ),
    (
        json.dumps({"chosen": HH + " x", "rejected": "\n\nHuman: other\n\nAssistant: y"}),
        "differ before",
    ),
    ('{"chosen": "plain", "rejected": "text"}', "expected turns"),
]


@pytest.mark.parametrize(
    ("load", "line", "message"),
    [(load_instructions, *case) for case in BAD_INSTRUCTIONS]
    + [(load_preferences, *case) for case in BAD_PREFERENCES],
)
def test_bad_rows_are_named_by_line_and_fatal_or_counted(gpt2, tmp_path, load, line, message):
    good = (
        {"instruction": "a", "output": "b"}
        if load is load_instructions
        else {"prompt": "a", "chosen": "b", "rejected": "c"}
    )
    file = tmp_path / "a.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n" + json.dumps(good).encode())
    with pytest.raises(UserError, match=message) as error:
        load(str(file), gpt2, 64)
    assert f"{file}:3: " in str(error.value)
    assert "\n" not in str(error.value)
    report = load(str(file), gpt2, 64, on_bad_row="skip", held_out=0.0).report
    assert (report.read, report.kept, report.bad.count) == (3, 2, 1)
    assert f"{file}:3: " in report.line()


def test_an_enormous_line_is_reported_and_not_held(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.data.records.MAX_LINE_BYTES", 1 << 16)
    good = json.dumps({"instruction": "a", "output": "b"})
    (tmp_path / "a.jsonl").write_text(
        good + "\n" + json.dumps({"instruction": "x" * 300_000, "output": "b"}) + "\n" + good
    )
    with pytest.raises(UserError, match=r"a.jsonl:2: the line is longer"):
        load_instructions(str(tmp_path / "a.jsonl"), gpt2, 64)
    report = load_instructions(
        str(tmp_path / "a.jsonl"), gpt2, 64, on_bad_row="skip", held_out=0.0
    ).report
    assert (report.read, report.kept, report.bad.count) == (3, 2, 1)


def test_rows_in_an_array_and_in_parquet_are_the_same_rows(gpt2, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"instruction": f"Say {n}.", "output": f"{n}!"} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    loaded = [
        load_instructions(str(tmp_path / f"a.{s}"), gpt2, 64, held_out=0.0).train
        for s in ("jsonl", "json", "parquet")
    ]
    assert [[e.ids.tolist() for e in examples] for examples in loaded[1:]] == [
        [e.ids.tolist() for e in loaded[0]]
    ] * 2


def test_a_bad_row_in_an_array_is_named_by_its_line(gpt2, tmp_path):
    (tmp_path / "a.json").write_text(
        '[\n{"instruction": "a", "output": "b"},\n{"instruction": "a",\n "output": ""}\n]'
    )
    with pytest.raises(UserError, match=r"a.json:3: field 'output' is empty"):
        load_instructions(str(tmp_path / "a.json"), gpt2, 64)

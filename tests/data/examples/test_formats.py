"""Instructions and preferences: the response and its end-of-text count, and no record is lost."""

import json

import numpy as np
import pytest

from fastlm.data.examples.formats import Message, read_dialogue, read_preference
from fastlm.data.examples.load import (
    Report,
    load_instructions,
    load_preferences,
    truncate,
    truncate_pair,
)
from fastlm.data.examples.templates import EncodedSequence, encode_dialogue, render_prompt
from fastlm.errors import UserError
from fastlm.tokenizer import load_tokenizer

CHAT = [
    ("system", "Be brief."),
    ("user", "Hi <|endoftext|> there"),
    ("assistant", "Hello."),
    ("user", "Bye"),
    ("assistant", "So long\n"),
]
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]
HH = "\n\nHuman: What is\n\n2+2?\n\nAssistant: Four.\n\nHuman: And 3+3?\n\nAssistant:"


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def counted_text(example, tokenizer):
    """The counted tokens, run by run."""
    runs, last = [], None
    for n in np.flatnonzero(example.counted).tolist():
        if last != n - 1:
            runs.append([])
        runs[-1].append(int(example.ids[n]))
        last = n
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("row", "template", "text", "counted"),
    [
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            "auto",
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a "
            "response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3",
            ["3"],
        ),
        (
            {"instruction": "Say hi.", "input": "", "output": "Hi"},
            "auto",
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nSay hi.\n\n### Response:\nHi",
            ["Hi"],
        ),
        ({"prompt": "Once", "completion": " upon"}, "auto", "Once upon", [" upon"]),
        (
            {"prompt": "Q", "completion": "A"},
            "chatml",
            "<|im_start|>user\nQ<|endoftext|>\n<|im_start|>assistant\nA",
            ["A"],
        ),
        (
            {"messages": MESSAGES},
            "auto",
            "<|im_start|>system\nBe brief.<|endoftext|>\n"
            "<|im_start|>user\nHi <|endoftext|> there<|endoftext|>\n"
            "<|im_start|>assistant\nHello.<|endoftext|>\n"
            "<|im_start|>user\nBye<|endoftext|>\n<|im_start|>assistant\nSo long\n",
            ["Hello.<|endoftext|>", "So long\n"],
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "auto",
            "<|im_start|>user\nQ<|endoftext|>\n<|im_start|>assistant\nA",
            ["A"],
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Q"}],
                "completion": [{"role": "assistant", "content": "A"}],
            },
            "auto",
            "<|im_start|>user\nQ<|endoftext|>\n<|im_start|>assistant\nA",
            ["A"],
        ),
    ],
)
def test_responses_and_their_end_are_counted_and_nothing_else(gpt2, row, template, text, counted):
    example = encode_dialogue(read_dialogue(row), gpt2, template)
    assert gpt2.decode(example.ids) == text + "<|endoftext|>"
    assert counted_text(example, gpt2) == [*counted[:-1], counted[-1] + "<|endoftext|>"]
    assert example.ids[-1] == gpt2.eos_id


def test_marks_inside_a_row_stay_text(gpt2):
    rows = [
        {"instruction": "What is <|endoftext|>?", "output": "The mark <|endoftext|> ends."},
        {"instruction": "What is this?", "input": "a <|endoftext|> b", "output": "A mark."},
        {"prompt": "<|endoftext|>", "completion": " x"},
    ]
    for row in rows:
        ids = encode_dialogue(read_dialogue(row), gpt2).ids.tolist()
        assert ids.count(gpt2.eos_id) == 1
        assert ids[-1] == gpt2.eos_id


def test_the_prompt_in_training_is_the_prompt_at_generation(gpt2):
    messages = [Message("user", "Add."), Message("assistant", "3")]
    for template in ("chatml", "alpaca"):
        example = encode_dialogue(
            read_dialogue({"instruction": "Add.", "output": "3"}), gpt2, template
        )
        prompt = gpt2.encode(render_prompt(messages[:1], gpt2, template), specials=True)
        assert example.ids[: len(prompt)].tolist() == prompt
        assert not example.counted[: len(prompt)].any()
        assert example.counted[len(prompt) :].all()


def test_a_jinja_file_and_transformers_render_the_same(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = (
        "{{ bos_token }}{% for message in messages %}\n    {% if message['role'] == 'user' %}\n"
        "[INST] {{ message['content'] }} [/INST]\n    {% else %}\n {{ message['content'] }}"
        "{{ eos_token }}\n    {% endif %}\n{% endfor %}\n"
    )
    (tmp_path / "t.jinja").write_text(source)
    row = {"messages": [m for m in MESSAGES if m["role"] != "system"]}
    example = encode_dialogue(read_dialogue(row), gpt2, str(tmp_path / "t.jinja"))
    from tokenizers import Tokenizer, models

    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))
    )
    theirs.eos_token, theirs.bos_token = "<|endoftext|>", ""
    rendered = theirs.apply_chat_template(row["messages"], chat_template=source, tokenize=False)
    assert gpt2.decode(example.ids) == rendered.rstrip("\n")


def test_a_tokenizer_s_own_template_is_used_and_loses_no_field(gpt2, tmp_path):
    import dataclasses

    theirs = dataclasses.replace(gpt2, name=str(tmp_path / "tokenizer.json"))
    row = read_dialogue({"instruction": "Add.", "input": "1, 2", "output": "3"})
    with pytest.raises(UserError, match="has none beside it"):
        encode_dialogue(row, theirs, "tokenizer")
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    for more in ("", "{{ 'assistant: ' if add_generation_prompt }}"):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template + more})
        )
        example = encode_dialogue(row, theirs, "tokenizer")
        assert (
            gpt2.decode(example.ids) == "user: Add.\n\n1, 2<|endoftext|>assistant: 3<|endoftext|>"
        )
        assert counted_text(example, gpt2) == ["3<|endoftext|>"]


def test_a_template_that_changes_the_answer_still_counts_it(gpt2, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}"
    )
    example = encode_dialogue(
        read_dialogue({"instruction": "ask", "output": "say"}), gpt2, str(tmp_path / "t.jinja")
    )
    assert counted_text(example, gpt2) == ["SAY\n<|endoftext|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(gpt2, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="only appends"):
        encode_dialogue(read_dialogue({"messages": MESSAGES}), gpt2, str(tmp_path / "t.jinja"))
    (tmp_path / "u.jinja").write_text("{% for %}")
    for name in (str(tmp_path / "u.jinja"), str(tmp_path / "none.jinja"), "none"):
        with pytest.raises(UserError, match="template"):
            encode_dialogue(read_dialogue({"messages": MESSAGES}), gpt2, name)


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


def make(prompt, response):
    return EncodedSequence(
        np.arange(prompt + response, dtype=np.int32), np.arange(prompt + response) >= prompt
    )


@pytest.mark.parametrize(
    ("prompt", "response", "kept_prompt", "kept_response", "counts"),
    [
        (10, 10, 10, 10, (0, 0, 0)),
        (50, 10, 30, 10, (1, 0, 0)),  # the oldest part of the prompt goes
        (50, 35, 10, 30, (1, 1, 0)),  # a quarter is left for the prompt, the response is cut
        (3, 60, 3, 37, (0, 1, 0)),
    ],
)
def test_truncation_keeps_the_response_and_is_counted(
    prompt, response, kept_prompt, kept_response, counts
):
    report = Report("x")
    short = truncate(make(prompt, response), 40, report)
    assert short.ids.tolist() == list(range(prompt - kept_prompt, prompt + kept_response))
    assert short.counted.tolist() == [False] * kept_prompt + [True] * kept_response
    assert (report.prompts_truncated, report.responses_truncated, report.dropped) == counts


def test_both_sides_of_a_pair_keep_the_same_prompt():
    report = Report("x")
    chosen, rejected = make(50, 5), make(50, 20)
    pair = truncate_pair(chosen, rejected, 40, report)
    assert [len(side.ids) for side in pair] == [25, 40]
    assert pair[0].ids[:20].tolist() == pair[1].ids[:20].tolist() == list(range(30, 50))
    assert (report.prompts_truncated, report.responses_truncated) == (1, 0)
    # Cut to the same ids: nothing to prefer.
    assert truncate_pair(make(5, 60), make(5, 70), 40, report) is None
    assert report.dropped == 1


def test_held_out_prompts_are_not_in_training(gpt2, tmp_path):
    rows = [{"instruction": f"Say {n % 100}.", "output": f"{n}!"} for n in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, validation, report = load_instructions(str(tmp_path / "a.jsonl"), gpt2, 64, held_out=0.1)
    prompts = [{tuple(e.ids[~e.counted].tolist()) for e in part} for part in (train, validation)]
    assert prompts[0] & prompts[1] == set()
    assert len(train) + len(validation) == report.kept == 400
    assert 10 < len(validation) < 100


def test_folder_parts_are_splits(gpt2, tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"instruction": name, "output": "x"}))
    train, validation, report = load_instructions(str(tmp_path), gpt2, 64)
    assert (len(train), len(validation), report.read) == (1, 1, 2)
    assert "validation" in gpt2.decode(validation[0].ids)


def test_unusable_sources_give_one_line(gpt2, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "none").mkdir()
    for name in ("empty.jsonl", "a.txt", "none", "missing.jsonl"):
        with pytest.raises(UserError) as error:
            load_instructions(str(tmp_path / name), gpt2, 64)
        assert "\n" not in str(error.value)


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

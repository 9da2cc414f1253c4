"""Dialogues as text: what of it is counted, and by whose template, against transformers."""

import json

import pytest
from helpers.examples import counted_text

from fastlm.data.examples.formats import Message, read_dialogue
from fastlm.data.examples.templates import encode_dialogue, render_prompt
from fastlm.errors import UserError

CHAT = [
    ("system", "Be brief."),
    ("user", "Hi <|endoftext|> there"),
    ("assistant", "Hello."),
    ("user", "Bye"),
    ("assistant", "So long\n"),
]
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]


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

"""fastlm export, import and chat as a user runs them.

There and back bit for bit, and other libraries read the same.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from helpers.models import randomised

from fastlm import checkpoint
from fastlm.cli import main
from fastlm.config import ModelConfig, Sampling
from fastlm.data.examples.formats import Message
from fastlm.data.examples.templates import encode_prompt
from fastlm.inference.generation import PromptCache, generate
from fastlm.interop.exporting import write_folder
from fastlm.interop.open_model import chat_template, open_model
from fastlm.tokenizer import gpt2_json, load_tokenizer

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=384, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64
)
TEXTS = [
    "Hello world!",
    "  two  spaces\n\n\nlines\t\ttabs ",
    "It's 2,024 isn't it? don't WE'LL",
    "na\u00efve Gr\u00f6\u00dfe \u4f60\u597d \U0001f389\U0001f469\u200d\U0001f469 \u200b",
    "<|endoftext|>",
    "x" * 50 + "    ",
    "\r\n\x00\x1c",
    "def f(x):\n    return x**2  # square\n",
    "\u00bc\u2177\u00b2 \u0663\u0664 \u0967",
]


def a_run(place: Path, config: ModelConfig, tokenizer: str, **state) -> Path:
    from dataclasses import asdict

    found = load_tokenizer(tokenizer)
    whole = {
        "step": 3,
        "validation_loss": None,
        "model": asdict(config),
        "tokenizer": found.name,
    } | state
    checkpoint.save(place / "checkpoints", randomised(config), {}, whole)
    return place


@pytest.fixture
def run(tmp_path, small_tokenizer) -> Path:
    return a_run(tmp_path / "run", CONFIG, str(small_tokenizer))


def same_bits(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_there_and_back_keeps_every_bit_and_the_tokenizer(run, tmp_path, capsys):
    there, back, again = str(tmp_path / "there"), str(tmp_path / "back"), str(tmp_path / "again")
    assert main(["export", str(run), "--to", there]) == 0
    assert main(["import", there, "--to", back]) == 0
    assert main(["export", back, "--to", again]) == 0
    assert "parameters" in capsys.readouterr().out
    (first, spoken), (second, heard) = open_model(str(run), CPU), open_model(back, CPU)
    assert first.config == second.config
    assert same_bits(first, second)
    assert spoken.hash == heard.hash
    assert Path(heard.name).is_relative_to(
        tmp_path / "back"
    )  # the run does not need the folder any more
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_transformers_reads_the_exported_model_and_its_tokenizer(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    model, tokenizer = open_model(str(run), CPU)
    tokens = torch.randint(384, (2, 30), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS[:4]:
        assert reader.encode(text) == tokenizer.encode(text)
        assert reader.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert reader.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_id


def test_gpt2_as_a_tokenizer_json_gives_the_same_ids(tmp_path):
    (tmp_path / "tokenizer.json").write_text(gpt2_json(), encoding="utf-8")
    theirs, ours = load_tokenizer(str(tmp_path)), load_tokenizer("gpt2")
    assert (theirs.vocab_size, theirs.eos_id) == (ours.vocab_size, ours.eos_id)
    for text in [*TEXTS, Path(__file__).read_text("utf-8")]:
        assert theirs.encode(text) == ours.encode(text), text
        assert theirs.encode(text, specials=True) == ours.encode(text, specials=True), text
        assert theirs.decode(ours.encode(text)) == text


def test_an_exported_gpt2_run_is_read_by_transformers_with_its_chat_template(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(
        vocab_size=50257, dim=8, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=16, max_seq_len=32
    )
    run = a_run(tmp_path / "run", config, "gpt2", template="chatml")
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer("gpt2")
    for text in TEXTS:
        assert reader.encode(text) == ours.encode(text, specials=True)
    messages = [
        Message("system", "Be brief."),
        Message("user", "What is 2 + 2?"),
        Message("assistant", "4"),
        Message("user", "+ 3?"),
    ]
    theirs = reader.apply_chat_template(
        [m._asdict() for m in messages], add_generation_prompt=True, return_dict=False
    )
    assert theirs == encode_prompt(messages, ours, "chatml")
    assert load_tokenizer(str(tmp_path / "out")).hash  # and the folder is a tokenizer here too


@pytest.mark.parametrize("template", ["alpaca", "none", "chatml"])
def test_the_template_that_was_asked_for_is_written(template, run, tmp_path):
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--template", template]) == 0
    file = tmp_path / "out" / "chat_template.jinja"
    assert file.exists() == (template != "none")
    if template == "none":
        return
    _, tokenizer = open_model(str(tmp_path / "out"), CPU)
    assert chat_template(str(tmp_path / "out"), tokenizer) == "tokenizer"
    messages = [Message("user", "Say <|endoftext|> twice")]
    assert encode_prompt(messages, tokenizer, "tokenizer") == encode_prompt(
        messages, tokenizer, template
    )
    ends = encode_prompt(messages, tokenizer, template).count(tokenizer.eos_id)
    assert ends == (template == "chatml")  # this template's own end of turn


def test_half_the_bytes_where_they_are_asked_for(run, tmp_path):
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half, _ = open_model(str(tmp_path / "out"), CPU)
    whole, _ = open_model(str(run), CPU)
    for a, b in zip(half.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16().float())


def test_stop_tokens_of_a_folder_are_exported_with_it(run, tmp_path):
    assert main(["export", str(run), "--to", str(tmp_path / "one")]) == 0
    (tmp_path / "one" / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    assert main(["import", str(tmp_path / "one"), "--to", str(tmp_path / "run2")]) == 0
    assert main(["export", str(tmp_path / "one"), "--to", str(tmp_path / "two")]) == 0
    assert json.loads((tmp_path / "two" / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [0, 5]


def test_every_stage_takes_a_folder_as_it_takes_a_run(run, small_text, tmp_path, capsys):
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    said = []
    for place in (run, tmp_path / "out"):
        capsys.readouterr()
        assert main(["generate", str(place), "--prompt", "import ", "--tokens", "12"]) == 0
        assert (
            main(["eval", str(place), "--data", str(small_text), "--protocols", "line", "--json"])
            == 0
        )
        said.append(capsys.readouterr().out.replace(str(place), "PLACE"))
    assert said[0] == said[1]


def test_memory_of_a_dialogue_changes_nothing_but_the_time(monkeypatch):
    model, memory = randomised(CONFIG), PromptCache()
    fed: list[int] = []
    monkeypatch.setattr(
        "fastlm.inference.generation.prefill", spy(fed, "fastlm.inference.generation", "prefill")
    )
    dialogue = [1, 2, 3]
    for more in ([4, 5], [6], [7, 8, 9], [], list(range(10, 40))):
        dialogue += more
        expected = generate(model, [dialogue], 6, Sampling(temperature=0))[0]
        fed.clear()
        assert (
            generate(model, [dialogue], 6, Sampling(temperature=0), prompt_cache=memory)[0]
            == expected
        )
        assert len(fed) <= 1
        dialogue += expected[:4]  # as when an answer is cut at a stop text
    changed = [1, 2, 99, *dialogue[3:20]]
    expected = generate(model, [changed], 6, Sampling(temperature=0))
    assert generate(model, [changed], 6, Sampling(temperature=0), prompt_cache=memory) == expected


def spy(calls: list[int], module: str, name: str):
    import importlib

    inner = getattr(importlib.import_module(module), name)

    def outer(*args):
        calls.append(1)
        return inner(*args)

    return outer


def test_chat_answers_turn_by_turn_and_remembers(run, tmp_path, capsys, monkeypatch):
    assert main(["export", str(run), "--to", str(tmp_path / "out"), "--template", "chatml"]) == 0
    model, tokenizer = open_model(str(tmp_path / "out"), CPU)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nAnd?\n/new\nHi\n\nnot read\n"))
    options = "--system S --tokens 5 --temperature 0 --repetition-penalty 1"
    assert main(["chat", str(tmp_path / "out"), *options.split()]) == 0
    out = capsys.readouterr().out
    messages, expected = [Message("system", "S")], []
    for line in ("Hi", "And?"):
        messages.append(Message("user", line))
        prompt = encode_prompt(messages, tokenizer, "tokenizer")
        ids = generate(model, [prompt], 5, Sampling(temperature=0), stop={tokenizer.eos_id})[0]
        expected.append(tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :])
        messages.append(Message("assistant", expected[-1].strip()))
    assert out == f"{expected[0]}\n{expected[1]}\n{expected[0]}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["export"], "export needs MODEL"),
        (["import"], "import needs MODEL"),
        (["chat"], "chat needs MODEL"),
        (["export", "{run}"], "export needs --to"),
        (["export", "no/run", "--to", "{tmp}/x"], "no/run does not exist"),
        (["export", "{run}", "--to", "{run}"], "exists and is not empty"),
        (
            ["export", "{run}", "--to", "{tmp}/x", "--template", "chatmI"],
            "chat template 'chatmI': expected",
        ),
        (
            ["import", "{run}", "--to", "{tmp}/x"],
            "holds no config.json; give a Hugging Face model folder",
        ),
        (["chat", "{run}", "--template", "tokenizer"], "has none beside it"),
    ],
)
def test_a_mistake_is_one_line(argv, words, run, tmp_path, mistake, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert words in mistake([word.format(run=run, tmp=tmp_path) for word in argv])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    small_text, small_tokenizer, tmp_path, mistake
):
    write_folder(
        randomised(ModelConfig(**(vars(CONFIG) | {"vocab_size": 300}))),
        {"tokenizer.json": small_tokenizer.read_text("utf-8")},
        0,
        tmp_path / "out",
    )
    for command in (
        ["eval", "--data", str(small_text)],
        ["generate"],
        ["chat"],
        ["export", "--to", str(tmp_path / "y")],
    ):
        assert "but the model knows 300" in mistake(
            [command[0], str(tmp_path / "out"), *command[1:]]
        )


def test_a_hub_model_is_fetched_once_and_then_a_folder(run, tmp_path, monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder, asked = tmp_path / "there", []
    assert main(["export", str(run), "--to", str(folder)]) == 0

    def snapshot(name: str, local_files_only: bool = False, **options) -> str:
        asked.append((name, local_files_only))
        if local_files_only and len(asked) == 1:
            raise LocalEntryNotFoundError("not here yet")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("fastlm.interop.open_model.require_hub", lambda name: None)
    capsys.readouterr()
    assert main(["generate", "hf:some/model", "--tokens", "3", "--temperature", "0"]) == 0
    fetched = capsys.readouterr().out
    assert asked[:2] == [("some/model", True), ("some/model", False)]
    assert main(["generate", str(folder), "--tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == fetched


def test_a_hub_model_without_a_hub_is_one_line(monkeypatch, mistake):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the Hugging Face hub does not answer" in mistake(
        ["generate", "hf:some/model-that-is-not-here"]
    )

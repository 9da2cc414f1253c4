"""Writing with a cache: against transformers, against the model without it; draws and their law."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import randomised

from fastlm.cli import main
from fastlm.config import ModelConfig, Sampling
from fastlm.errors import UserError
from fastlm.inference.cache import feed, feed_at, prefill
from fastlm.inference.generation import PromptCache, generate, write_in_graph
from fastlm.inference.sampling import choose, fixed_point_sums, restrict, uniform
from fastlm.inference.text import TextStream, write_texts
from fastlm.interop.exporting import write_folder
from fastlm.interop.open_model import stop_tokens
from fastlm.kernels.linear import FEW_ROWS
from fastlm.tokenizer import load_tokenizer

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
SMALL = ModelConfig(
    vocab_size=150, dim=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=80, max_seq_len=260
)
SHAPES = {
    "grouped queries, tied": SMALL,
    "one key head, untied, wide heads": replace(
        SMALL, n_kv_heads=1, tie_embeddings=False, head_width=20
    ),
    "qwen2, biases": replace(SMALL, qkv_bias=True, n_kv_heads=4),
    "qwen3, norms": replace(SMALL, qk_norm=True, head_width=16, tie_embeddings=False),
}


def some_prompts(n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(150, (1 + 3 * i,), generator=generator).tolist() for i in range(n)]


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_equals_transformers_token_for_token(name, tmp_path):
    """200 tokens of 20 prompts of 1 to 58 tokens: in batches of 20 and 5, and alone."""
    transformers = pytest.importorskip("transformers")
    model, prompts = randomised(SHAPES[name]), some_prompts(20)
    write_folder(model, {}, 0, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    theirs.generation_config.eos_token_id = None
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    expected = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=200, do_sample=False, pad_token_id=0
    )[:, longest:]
    assert generate(model, prompts, 200, GREEDY) == expected.tolist()
    assert generate(model, prompts[:5], 200, GREEDY) == expected[:5].tolist()
    alone = theirs.generate(padded[-1:], max_new_tokens=200, do_sample=False)[0, longest:]
    assert generate(model, prompts[-1:], 200, GREEDY) == [alone.tolist()]


def test_cached_logits_equal_the_model_without_a_cache():
    model = randomised(SMALL)
    prompts = some_prompts(3)
    cache, first = prefill(model, prompts, 40)
    more = torch.randint(150, (3, 4), generator=torch.Generator().manual_seed(5))
    second = feed(model, cache, more[:, :3])  # several tokens at once, as when a dialogue goes on
    third = feed(model, cache, more[:, 3:])
    for row, prompt in enumerate(prompts):
        whole = model.logits(torch.tensor([[*prompt, *more[row].tolist()]]))[0]
        at = len(prompt) - 1
        for found, expected in (
            (first, whole[at]),
            (second, whole[at + 3]),
            (third, whole[at + 4]),
        ):
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
def test_the_registered_operators_write_the_same_as_the_native_ones(rows, monkeypatch):
    model, prompts = randomised(SHAPES["qwen2, biases"]), some_prompts(5) * 8
    ours = generate(model, prompts[:rows], 20, GREEDY)
    monkeypatch.setattr("fastlm.kernels.native.direct", lambda *tensors: False)
    assert generate(model, prompts[:rows], 20, GREEDY) == ours


@torch.inference_mode()
def prefill_with_zeros(*args):
    """prefill(), whose cache is 0 where nothing is written yet, as on a GPU."""
    cache, logits = prefill(*args)
    for part in (*cache.keys, *cache.values):
        part[:, :, cache.filled :] = 0
    return cache, logits


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(top_p=0.9), Sampling(min_p=0.05, repetition_penalty=1.3)]
)
@pytest.mark.parametrize("name", SHAPES)
def test_the_steps_that_a_gpu_replays_write_the_same_texts(name, sampling, monkeypatch):
    """On the CPU: prompts of unlike lengths, one alone, a dialogue, and beyond the context."""
    model, prompts = randomised(replace(SHAPES[name], max_seq_len=64)), some_prompts(6)

    def texts() -> list:
        memory = PromptCache()
        stop = {5, 77}
        heard: list[tuple[int, int]] = []
        each = lambda row, token: heard.append((row, token))  # noqa: E731 - never ends a row
        alone = [generate(model, prompts[2:3], n, sampling, seed=n) for n in (1, 2, 3, 90)]
        turns = [generate(model, [[9, 8]], 12, sampling, stop=stop, prompt_cache=memory)]
        turns.append(generate(model, [[*memory.ids, 3, 4]], 9, sampling, prompt_cache=memory))
        return [
            generate(model, prompts, 70, sampling, 3, stop, each),
            heard,
            alone,
            turns,
            memory.ids,
        ]

    expected = texts()
    monkeypatch.setattr("fastlm.inference.generation.write_step_by_step", write_in_graph)
    monkeypatch.setattr("fastlm.inference.generation.prefill", prefill_with_zeros)
    assert texts() == expected


def test_a_step_that_is_replayed_depends_on_its_tensors_alone():
    """Its column is read from a tensor, and nothing on the host tells it to go on."""
    model = randomised(SMALL)
    prompts = some_prompts(3)
    cache, _ = prefill_with_zeros(model, prompts, 40)
    filled, column = cache.filled, torch.tensor([cache.filled])
    more = torch.randint(150, (3, 4), generator=torch.Generator().manual_seed(5))
    for n in range(4):
        found = feed_at(model, cache, more[:, n], column)
        column += 1
        for row, prompt in enumerate(prompts):
            whole = model.logits(torch.tensor([[*prompt, *more[row, : n + 1].tolist()]]))[0, -1]
            torch.testing.assert_close(found[row], whole, rtol=1e-4, atol=1e-4)
    assert cache.filled == filled


def test_sums_in_fixed_point_do_not_depend_on_the_order_of_additions():
    x = torch.rand(
        2, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).softmax(-1)
    torch.testing.assert_close(fixed_point_sums(x), x.cumsum(-1), rtol=0, atol=5000 * 2.0**-40)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fixed_point_sums(x[:, order])[:, -1], fixed_point_sums(x)[:, -1])


def test_numbers_drawn_ahead_are_those_drawn_one_by_one():
    ahead, single = ([torch.Generator().manual_seed(n) for n in range(3)] for _ in range(2))
    assert torch.equal(uniform(ahead, 40), torch.cat([uniform(single) for _ in range(40)]))


def test_beyond_its_context_the_model_goes_on_from_the_last_half():
    model = randomised(replace(SMALL, max_seq_len=16))
    prompt = list(range(10))
    out = generate(model, [prompt], 30, GREEDY)[0]
    text = prompt + out
    assert len(out) == 30
    start = 0
    for end in range(len(prompt), len(text)):
        if end - start > 16:
            start = end - 8
        assert text[end] == model.logits(torch.tensor([text[start:end]]))[0, -1].argmax()
    long = some_prompts(15)[-1]
    assert generate(model, [long], 1, GREEDY)[0] == [
        int(model.logits(torch.tensor([long[-16:]]))[0, -1].argmax())
    ]


def test_a_text_depends_on_its_seed_and_not_on_its_neighbours():
    model, prompts, sampling = (
        randomised(SMALL),
        some_prompts(4),
        Sampling(temperature=1.0, top_p=0.9),
    )
    texts = generate(model, prompts, 20, sampling, seed=7)
    assert texts == generate(model, prompts, 20, sampling, seed=7)
    assert texts != generate(model, prompts, 20, sampling, seed=8)
    assert [
        generate(model, [p], 20, sampling, seed=7 + i)[0] for i, p in enumerate(prompts)
    ] == texts


def test_rows_end_at_a_stop_token_or_where_they_are_told():
    model, prompts = randomised(SMALL), some_prompts(3)
    free = generate(model, prompts, 12, GREEDY)
    stop = free[0][5]
    ended = generate(model, prompts, 12, GREEDY, stop={stop})
    for row, whole in zip(ended, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
    seen: list[tuple[int, int]] = []

    def each(row: int, token: int) -> bool:
        seen.append((row, token))
        return row == 1

    assert generate(model, prompts, 12, GREEDY, each=each) == [free[0], free[1][:1], free[2]]
    assert [t for r, t in seen if r == 2] == free[2]


LAWS = {
    "as it is": Sampling(),
    "temperature": Sampling(temperature=0.6),
    "top-k": Sampling(top_k=5),
    "top-p": Sampling(top_p=0.7),
    "min-p": Sampling(min_p=0.2),
    "all": Sampling(temperature=1.3, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.4),
    "more than a few": Sampling(temperature=3.0, top_p=0.999),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_law_equals_that_of_transformers(name):
    processors = pytest.importorskip("transformers.generation.logits_process")
    s = LAWS[name]
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 500, generator=generator)
    ids = torch.randint(500, (4, 30), generator=generator)
    seen = torch.zeros(4, 500, dtype=torch.bool).scatter(1, ids, True)
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(s.repetition_penalty),
        processors.TemperatureLogitsWarper(s.temperature),
        *([processors.TopKLogitsWarper(s.top_k)] if s.top_k else []),
        *([processors.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []),
        *([processors.MinPLogitsWarper(s.min_p)] if s.min_p else []),
    ]
    expected = logits
    for processor in chain:
        expected = processor(ids, expected)
    torch.testing.assert_close(restrict(logits, s, seen), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["as it is", "top-p"])
def test_draws_follow_the_law(name):
    logits = torch.linspace(-2, 2, 8).expand(4000, 8).contiguous()
    law = restrict(logits[:1], LAWS[name]).softmax(-1)[0].double().numpy()
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    counts = np.bincount(choose(logits, LAWS[name], uniform(generators)[0]).numpy(), minlength=8)
    assert (counts[law == 0] == 0).all()
    expected = 4000 * law[law > 0]
    assert (
        (counts[law > 0] - expected) ** 2 / expected
    ).sum() < 26  # chi-squared of 7 degrees: above it 5 times in 10,000


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer):
    return load_tokenizer(str(small_tokenizer))


def shown(tokenizer, text: str, stop: list[str]) -> tuple[str, list[str]]:
    stream, parts = TextStream(tokenizer, [], stop), []
    for token in tokenizer.encode(text):
        parts.append(stream.push(token))
        if stream.stopped:
            break
    return "".join(parts) + stream.rest(), parts


def test_a_stream_shows_whole_characters_and_the_whole_text(tokenizer):
    text = "Grüße, 你好 — 🎉🎉 done\n  x = 1"
    found, parts = shown(tokenizer, text, [])
    assert found == text
    assert not any("\ufffd" in part for part in parts)
    assert sum(map(bool, parts)) > 10
    half = tokenizer.encode("🎉")[:2]
    stream = TextStream(tokenizer, [])
    assert "".join(map(stream.push, half)) + stream.rest() == tokenizer.decode(half)


@pytest.mark.parametrize("stop", [["def "], ["zzz", "ssert"], ["\n\n", "\n#"], ["", "never"]])
def test_a_stream_ends_before_the_first_stop_text_and_never_shows_a_part_of_it(tokenizer, stop):
    text = "class A:\n    assert True\n\n\ndef f():\n    pass\n#"
    at = min((text.index(s) for s in stop if s and s in text), default=len(text))
    found, parts = shown(tokenizer, text, stop)
    assert found == text[:at]
    for n in range(len(parts)):
        assert text[:at].startswith("".join(parts[:n]))


def test_texts_of_a_batch_equal_decoding_the_ids(tokenizer):
    model = randomised(replace(SMALL, vocab_size=384))
    prompts = [tokenizer.encode(t) for t in ("def f", "class Other(", "x")]
    ids = generate(model, prompts, 25, Sampling(), seed=3)
    pieces: dict[int, str] = {0: "", 1: "", 2: ""}

    def show(row: int, text: str) -> None:
        pieces[row] += text

    texts = write_texts(model, tokenizer, prompts, 25, Sampling(), 3, show=show)
    assert texts == [
        tokenizer.decode(p + i)[len(tokenizer.decode(p)) :]
        for p, i in zip(prompts, ids, strict=True)
    ]
    assert list(pieces.values()) == texts


@pytest.fixture(scope="module")
def folder(small_tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "exported"
    write_folder(
        randomised(replace(SMALL, vocab_size=384)),
        {"tokenizer.json": small_tokenizer.read_text("utf-8")},
        0,
        place,
    )
    return place


def test_the_command_writes_one_prompt_or_several(folder, tokenizer, capsys):
    options = ["--tokens", "9", "--temperature", "0"]
    assert main(["generate", str(folder), "--prompt", "def f", *options]) == 0
    one = capsys.readouterr().out
    assert one.startswith("def f")
    assert (
        main(
            ["generate", str(folder), "--prompt", "def f", "--prompt", "while ", *options, "--json"]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == ["def f", "while "]
    assert one == "def f" + rows[0]["text"] + "\n"
    assert main(["generate", str(folder), "--prompt", "def f", "--prompt", "while ", *options]) == 0
    assert capsys.readouterr().out == f"{one}\nwhile {rows[1]['text']}\n"
    stop = rows[0]["text"][3:5]
    assert (
        main(
            [
                "generate",
                str(folder),
                "--prompt",
                "def f",
                *options,
                "--stop",
                stop,
                "--stop",
                "never",
            ]
        )
        == 0
    )
    assert (
        capsys.readouterr().out == "def f" + rows[0]["text"][: rows[0]["text"].index(stop)] + "\n"
    )


def test_a_folder_names_its_own_stop_tokens(folder, tokenizer, tmp_path):
    assert stop_tokens(str(folder), tokenizer) == {tokenizer.eos_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert stop_tokens(str(tmp_path), tokenizer) == {tokenizer.eos_id, 7, 9}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match="could not read"):
        stop_tokens(str(tmp_path), tokenizer)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--top-k", "-1"], "top_k is -1"),
        (["--min-p", "2"], "min_p is 2.0; it must lie in [0, 1]"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--tokenizer", "gpt2"], "has 50257 tokens, but the model knows 384"),
        (["--stop"], "--stop needs a value"),
    ],
)
def test_a_mistake_is_one_line(extra, words, folder, mistake):
    assert words in mistake(["generate", str(folder), *extra])

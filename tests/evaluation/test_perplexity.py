"""Every protocol against a loop that scores one token at a time.

And the totals against everything that they must not depend on.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.cli import main
from fastlm.config import ModelConfig
from fastlm.errors import UserError
from fastlm.evaluation import evaluate, protocols
from fastlm.evaluation.evaluate import read_documents
from fastlm.evaluation.protocols import (
    Segment,
    detokenise,
    make,
    wikitext_documents,
    window_segments,
)
from fastlm.evaluation.score import batches, batches_of_few_shapes, segment_nats, summarise
from fastlm.interop.exporting import write_folder
from fastlm.model import build
from fastlm.tokenizer import load_tokenizer

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=384, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=40
)
TEXT = (
    "The valley's 12 oaks ( all old ) grew , it is said , in 1 @,@ 000 years .\n\n"
    ' = Next = \n\nA " second " text @-@ like one : \n'
) * 6


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer):
    return load_tokenizer(str(small_tokenizer))


@pytest.fixture(scope="module")
def model():
    made = build(CONFIG, 0, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return made.eval()


def one_by_one(model, ids: list[int], first: int) -> float:
    """-log p of ids[first:], each from a forward pass of its own over what stands before it."""
    total = 0.0
    for i in range(first, len(ids)):
        logits = model.logits(torch.tensor([ids[:i]]))[0, -1].double()
        total -= logits.log_softmax(-1)[ids[i]].item()
    return total


def score(model, name: str, documents: list[str], tokenizer) -> tuple[float, int]:
    protocol = make(name, documents, tokenizer, CONFIG.max_seq_len)
    result = summarise(protocol, segment_nats(model, protocol.segments, CPU))
    assert result.perplexity == pytest.approx(math.exp(result.nats / result.tokens))
    return result.nats, result.tokens


def test_window_equals_a_loop_over_windows(model, tokenizer):
    ids = tokenizer.encode(TEXT)
    windows = [ids[i : i + 40] for i in range(0, len(ids), 40)]
    expected = sum(one_by_one(model, w, 1) for w in windows)
    nats, tokens = score(model, "window", [TEXT], tokenizer)
    assert nats == pytest.approx(expected, rel=1e-6)
    assert tokens == len(ids) - len(windows)


def test_stride_scores_every_token_once_with_the_context_of_its_first_window(
    model, tokenizer, monkeypatch
):
    monkeypatch.setattr(protocols, "STRIDE", 15)
    ids = tokenizer.encode(TEXT)
    expected, done = 0.0, 1
    for begin in range(0, len(ids), 15):  # the loop of the Hugging Face guide
        end = min(begin + 40, len(ids))
        expected += one_by_one(model, ids[begin:end], max(1, done - begin))
        done = end
        if end == len(ids):
            break
    nats, tokens = score(model, "stride", [TEXT], tokenizer)
    assert nats == pytest.approx(expected, rel=1e-6)
    assert tokens == len(ids) - 1


def test_line_scores_the_first_hundred_lines_each_alone(model, tokenizer):
    text = "\n".join(f"line number {i} of many" if i % 3 else "   " for i in range(200))
    lines = [line for line in text.splitlines() if line.strip()][:100]
    expected = sum(one_by_one(model, tokenizer.encode(line)[:40], 1) for line in lines)
    nats, tokens = score(model, "line", [text], tokenizer)
    assert nats == pytest.approx(expected, rel=1e-6)
    assert tokens == sum(len(tokenizer.encode(line)[:40]) - 1 for line in lines)


def test_words_and_bytes_are_those_of_the_text_that_was_scored(tokenizer):
    """Lines longer than the model's texts: what is cut off counts nowhere.

    Each token is a byte here, or more.
    """
    short, long = "one two three four", "a longer line, " * 20
    for name, documents in (
        ("line", [f"{short}\n{long}\n"]),
        ("window", [long * 3]),
        ("stride", [long * 3]),
    ):
        protocol = make(name, documents, tokenizer, 40)
        scored = [tokenizer.decode(s.ids[s.start :]) for s in protocol.segments]
        text = "".join(documents)
        assert all(part in text for part in scored)
        assert protocol.text_bytes == sum(map(len, scored)) < len(text)
        assert protocol.words == sum(len(part.split()) for part in scored)
    protocol = make("line", [f"{short}\n{long}\n"], tokenizer, 40)
    assert protocol.text_bytes < len(short) + 40 * max(
        len(tokenizer.piece(i)) for i in tokenizer.encode(long)
    )
    assert protocol.how == "2 lines, 1 of them cut to 40 tokens"
    assert make("window", [long * 3], tokenizer, 40).how == "windows of 40 tokens, one every 40"
    assert (
        make("stride", [long * 300], tokenizer, 4096).how == "windows of 1024 tokens, one every 512"
    )


def test_word_scores_every_token_of_every_document_after_end_of_text(model, tokenizer):
    documents = [TEXT, "Short one .", "x " * 50]
    expected = 0.0
    for document in (
        documents
    ):  # rolling windows: 40 new tokens at a time, the last one with all the context that fits
        ids = tokenizer.encode(detokenise(document))
        for begin in range(0, len(ids), 40):
            end = min(begin + 40, len(ids))
            context = [tokenizer.eos_id, *ids[:end]] if begin == 0 else ids[max(0, end - 41) : end]
            expected += one_by_one(model, context, len(context) - (end - begin))
    nats, tokens = score(model, "word", documents, tokenizer)
    assert nats == pytest.approx(expected, rel=1e-6)
    assert tokens == sum(len(tokenizer.encode(detokenise(d))) for d in documents)
    protocol = make("word", documents, tokenizer, 40)
    result = summarise(protocol, segment_nats(model, protocol.segments, CPU))
    words = sum(len(re.split(r"\s+", d)) for d in documents)
    size = sum(len(d.encode()) for d in documents)
    assert result.word_perplexity == pytest.approx(math.exp(expected / words), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / size / math.log(2), rel=1e-6)


def test_detokenising_undoes_wikitext_spacing():
    text = (
        ' = Title = \n He said " no " ( twice ) , '
        "in 1 @,@ 000 half @-@ days ; 3 @.@ 5 . It 's N of \n"
    )
    assert (
        detokenise(text)
        == ' = Title =\nHe said "no" (twice), in 1,000 half-days; 3.5. It\'s 1 of\n'
    )


def test_total_nats_do_not_depend_on_the_batches(model, tokenizer):
    segments = make("line", [TEXT, "b " * 30, "some words\n" * 9], tokenizer, 40).segments
    whole = segment_nats(model, segments, CPU, batch_tokens=100_000)
    for budget in (1, 50, 97):
        assert segment_nats(model, segments, CPU, batch_tokens=budget) == pytest.approx(
            whole, rel=1e-5
        )
        assert segment_nats(model, segments, CPU, batch_tokens=budget).sum() == pytest.approx(
            whole.sum(), rel=1e-6
        )


def test_compiled_nats_are_the_eager_ones_from_one_graph_a_shape():
    model = build(replace(CONFIG, n_layers=1, max_seq_len=300), 0, CPU).eval()
    segments = [Segment([7] * (n + 1), 1, n) for n in (1, 2, 3, 6, 12, 20, 40, 80, 150, 290)]
    shapes = {
        tuple(shape) for _, *shape in batches_of_few_shapes([len(s.ids) - 1 for s in segments], 97)
    }
    assert len(shapes) > torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    nats = segment_nats(model, segments, CPU, batch_tokens=97, compile=True)
    assert nats == pytest.approx(segment_nats(model, segments, CPU), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(shapes)


@given(lengths=st.lists(st.integers(1, 300), max_size=60), budget=st.integers(1, 1000))
@settings(max_examples=200, deadline=None)
def test_batches_hold_each_segment_once_within_the_budget(lengths, budget):
    for split in (batches, batches_of_few_shapes):
        found = list(split(lengths, budget))
        assert sorted(i for batch, _, _ in found for i in batch) == list(range(len(lengths)))
        for batch, rows, columns in found:
            assert 0 < len(batch) <= rows
            assert rows == 1 or rows * columns <= budget
            assert (
                max(lengths[i] for i in batch) <= columns < 2 * min(lengths[i] for i in batch)
                or split is batches
            )
    shapes = {tuple(shape) for _, *shape in batches_of_few_shapes(lengths, budget)}
    assert len({columns for _, columns in shapes}) == len(shapes) <= 10


@pytest.mark.slow
def test_total_nats_do_not_depend_on_the_number_of_processes(model, small_tokenizer, tmp_path):
    """The command under torchrun, two processes and gloo, against one; only the first prints."""
    write_folder(
        model, {"tokenizer.json": small_tokenizer.read_text(encoding="utf-8")}, 0, tmp_path / "m"
    )
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--json", "--device", "cpu", "--batch-tokens", "80"]
    data = ["--data", str(tmp_path / "text.txt")]
    command = ["-m", "fastlm", "eval", str(tmp_path / "m"), *data, *options]
    run = partial(
        subprocess.run, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    alone = json.loads(run([sys.executable, *command]).stdout)["results"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = json.loads(run([sys.executable, *launcher, *command]).stdout)["results"]
    assert [r["protocol"] for r in together] == list(protocols.NAMES)
    for a, b in zip(alone, together, strict=True):
        assert b["nats"] == pytest.approx(a["nats"], rel=1e-6)
        assert b["low"] == pytest.approx(a["low"], rel=1e-6)


@pytest.mark.slow
def test_processes_with_unlike_free_memory_score_each_segment_once():
    script = Path(__file__).with_name("uneven_memory.py")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("vocab_size", [384, 385])
def test_a_uniform_model_scores_its_vocabulary_size(tokenizer, vocab_size):
    uniform = build(replace(CONFIG, vocab_size=vocab_size), 0, CPU)
    with torch.no_grad():
        uniform.embedding.zero_()
    for name in protocols.NAMES:
        protocol = make(name, [TEXT], tokenizer, 40)
        result = summarise(protocol, segment_nats(uniform, protocol.segments, CPU))
        assert result.perplexity == pytest.approx(vocab_size, rel=1e-6)
        assert result.low == pytest.approx(result.high)


def test_windows_cover_every_token_exactly_once():
    for n in (1, 2, 39, 40, 41, 80, 81, 100):
        for stride in (7, 40):
            ids = list(range(n))
            seen = [i for s in window_segments(ids, 40, stride) for i in s.ids[s.start :]]
            missing = sorted(set(ids) - set(seen))
            assert len(seen) == len(set(seen))
            assert missing == ([0] if stride == 7 else list(range(0, n, 40)))


def test_the_interval_holds_the_perplexity_and_shrinks_with_more_documents():
    rng = np.random.default_rng(1)

    def result(n):
        protocol = protocols.Protocol(
            "x", [Segment([0] * 11, 1, i) for i in range(n)], 1, 1, "none"
        )
        return summarise(protocol, rng.normal(30, 3, n))

    few, many = result(20), result(2000)
    assert few.low < few.perplexity < few.high
    assert many.high - many.low < 0.3 * (few.high - few.low)


def test_articles_start_at_level_one_headings():
    text = " \n = One = \n\n text \n = = Section = = \n more \n = Two = \n\n end \n"
    parts = wikitext_documents(text)
    assert "".join(parts).strip() == text.strip()
    assert [p.strip().split("\n")[0].strip() for p in parts] == ["= One =", "= Two ="]


def test_the_first_documents_of_one_text_are_its_first_articles(tmp_path):
    articles = [f" = {name} = \n\n{name} is a place . \n" for name in ("Alba", "Brno", "Cork")]
    (tmp_path / "text.txt").write_text("".join(articles), encoding="utf-8")
    for many, expected in ((0, articles), (2, articles[:2])):
        assert read_documents(str(tmp_path / "text.txt"), "", many)[0] == expected


def test_the_command_scores_runs_and_hugging_face_folders_alike(
    model, small_tokenizer, small_text, tmp_path, capsys
):
    files = {"tokenizer.json": small_tokenizer.read_text(encoding="utf-8")}
    write_folder(model, files, 0, tmp_path / "exported")
    arguments = [
        "eval",
        str(tmp_path / "exported"),
        "--data",
        str(small_text),
        "--max-documents",
        "1",
        "--protocols",
        "line",
    ]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["results"]
    tokenizer = load_tokenizer(str(small_tokenizer))
    protocol = make("line", [small_text.read_text()], tokenizer, 40)
    assert row["nats"] == pytest.approx(segment_nats(model, protocol.segments, CPU).sum(), rel=1e-6)
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"{row['perplexity']:.2f}" in text
    assert report["text_sha256"] in text
    assert report["tf32"] is False
    assert "TF32" not in text


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--protocols", "windw"], "unknown protocol 'windw'; did you mean window"),
        (["--split", "tset"], "has no split 'tset'"),
        (["--data", "no/such.txt"], "no/such.txt"),
        (["--batch-tokens", "-1"], "batch_tokens is -1"),
        (["--tf32", "--device", "cpu"], "--tf32 needs an NVIDIA GPU"),
    ],
)
def test_a_mistake_is_one_line(extra, words, model, small_tokenizer, small_text, tmp_path, mistake):
    files = {"tokenizer.json": small_tokenizer.read_text(encoding="utf-8")}
    write_folder(model, files, 0, tmp_path / "model")
    assert words in mistake(["eval", str(tmp_path / "model"), "--data", str(small_text), *extra])


def test_a_wrong_second_model_is_told_before_the_first_is_scored(tmp_path, mistake):
    (tmp_path / "config.json").write_text("{}")
    line = mistake(["eval", str(tmp_path), "nowhere", "--data", "no/such.txt"])
    assert "nowhere does not exist" in line


@pytest.mark.parametrize(
    ("name", "text"),
    [("window", "a"), ("stride", "a few words"), ("line", "a"), ("word", ""), ("line", " \n")],
)
def test_text_too_short_to_score_is_named(name, text, tokenizer):
    with pytest.raises(UserError, match=f"protocol {name}: the text has .*too few") as caught:
        make(name, [text], tokenizer, 40)
    assert "\n" not in str(caught.value)


def test_protocols_that_do_not_apply_are_left_out_unless_they_were_named(
    model, small_tokenizer, tmp_path, capsys
):
    write_folder(
        model, {"tokenizer.json": small_tokenizer.read_text(encoding="utf-8")}, 0, tmp_path / "m"
    )
    (tmp_path / "short.txt").write_text("A few words.")
    (tmp_path / "blank.txt").write_text(" \n\n ")
    command = ["eval", str(tmp_path / "m"), "--data", str(tmp_path / "short.txt")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "left out: protocol window: the text has" in out
    assert "left out: protocol stride: the text has" in out
    assert main([*command, "--protocols", "line,window"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*command[:-1], str(tmp_path / "blank.txt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_text_of_the_next_protocol_is_tokenised_while_one_is_scored(
    model, small_tokenizer, small_text, tmp_path, monkeypatch
):
    write_folder(
        model, {"tokenizer.json": small_tokenizer.read_text(encoding="utf-8")}, 0, tmp_path / "m"
    )
    scoring, plain_make, plain_nats = threading.Event(), protocols.make, evaluate.segment_nats

    def make_after_scoring_began(name, *rest):
        assert name == "window" or scoring.wait(timeout=60)
        return plain_make(name, *rest)

    def nats(*arguments):
        scoring.set()
        return plain_nats(*arguments)

    monkeypatch.setattr(protocols, "make", make_after_scoring_began)
    monkeypatch.setattr(evaluate, "segment_nats", nats)
    assert (
        main(["eval", str(tmp_path / "m"), "--data", str(small_text), "--protocols", "window,word"])
        == 0
    )


def foreign(tmp_path, kind: str, small_tokenizer, **options):
    """A random model of an architecture that is not Llama's, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=384, **options)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.2 * torch.randn(p.shape)
    theirs.save_pretrained(tmp_path / kind)
    (tmp_path / kind / "tokenizer.json").write_text(
        small_tokenizer.read_text(encoding="utf-8"), encoding="utf-8"
    )
    return theirs, tmp_path / kind


SMALL_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
FOREIGN = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "gpt_neox": SMALL_SHAPE | {"intermediate_size": 48},
    "cohere": SMALL_SHAPE
    | {"intermediate_size": 48, "logit_scale": 0.3, "num_key_value_heads": 2},  # more than a head
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_architectures_are_scored_through_transformers(
    kind, small_tokenizer, model, tmp_path, capsys
):
    theirs, folder = foreign(tmp_path, kind, small_tokenizer, **FOREIGN[kind])
    write_folder(
        model, {"tokenizer.json": small_tokenizer.read_text(encoding="utf-8")}, 0, tmp_path / "ours"
    )
    (tmp_path / "text.txt").write_text(TEXT)
    data = ["--data", str(tmp_path / "text.txt"), "--protocols", "stride,word", "--json"]
    assert main(["eval", str(folder), str(tmp_path / "ours"), *data]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [(r["model"], r["protocol"]) for r in rows] == [
        (str(m), p) for m in (folder, tmp_path / "ours") for p in ("stride", "word")
    ]
    tokenizer = load_tokenizer(str(small_tokenizer))
    documents = wikitext_documents(TEXT)
    for row in rows[:2]:
        nats = 0.0
        for s in make(row["protocol"], documents, tokenizer, 40).segments:
            ids = torch.tensor([s.ids])
            logps = theirs(ids[:, :-1]).logits[0].double().log_softmax(-1)
            nats -= logps.gather(1, ids[0, 1:, None])[s.start - 1 :].sum().item()
        assert row["nats"] == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: cut(f / "model.safetensors"), "transformers could not load"),
        (lambda f: (f / "model.safetensors").unlink(), "transformers could not load"),
        (lambda f: change(f, architectures=["NoSuchModel"], model_type="nosuch"), "(NoSuchModel)"),
        (lambda f: change(f, n_layer=3), "is missing from its safetensors files"),
        (lambda f: change(f, n_embd=64), "transformers could not load"),
        (lambda f: (f / "tokenizer.json").unlink(), "a folder without tokenizer.json"),
    ],
)
def test_a_fault_in_another_architecture_is_one_line(
    harm, words, small_tokenizer, small_text, tmp_path, capsys
):
    _, folder = foreign(tmp_path, "gpt2", small_tokenizer, **FOREIGN["gpt2"])
    harm(folder)
    capsys.readouterr()
    assert main(["eval", str(folder), "--data", str(small_text), "--max-documents", "1"]) == 2
    error = capsys.readouterr().err
    line = [part for part in error.splitlines() if part.startswith("fastlm: ")]
    assert len(line) == 1
    assert words in line[0]


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_records_without_a_text_end_the_command_or_are_left_out_and_counted(
    model, small_tokenizer, small_text, tmp_path, capsys
):
    files = {"tokenizer.json": small_tokenizer.read_text(encoding="utf-8")}
    write_folder(model, files, 0, tmp_path / "model")
    good = json.dumps({"text": small_text.read_text(encoding="utf-8")[:2000]})
    (tmp_path / "text.jsonl").write_text(f'{good}\n{{"text": 3}}\n')
    command = ["eval", str(tmp_path / "model"), "--data", str(tmp_path / "text.jsonl")]
    assert main(command) == 2
    assert "text.jsonl:2: field 'text': expected text, got int" in capsys.readouterr().err
    assert main([*command, "--bad-rows", "skip", "--protocols", "window"]) == 0
    said = capsys.readouterr().out
    assert "1 records without a text left out" in said
    assert re.search(r"model, window: perplexity [\d,.]+\n", said)

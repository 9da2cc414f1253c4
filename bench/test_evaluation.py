"""Perplexity of a 135M Llama on the CPU, against the plain loops over transformers people write."""

from __future__ import annotations

import statistics

import pytest

from bench.harness.contender import each, ratio, rounds_of

pytest.importorskip(
    "transformers", reason="transformers, the peer of these cases, is not installed"
)


def scoring_flops(size: str, stride: bool) -> tuple[int, float]:
    """Tokens scored, and FLOPs: every window's pass, and the head once for each scored token."""
    from bench.peers.language_models import TOKENS, WINDOW, shape
    from fastlm.model import training_flops_per_token

    c, window = shape(size), WINDOW[size]
    tokens = TOKENS[size] // (2 if stride else 1)
    seen = (tokens // (window // 2) - 1) * window if stride else tokens
    head = 2.0 * c.vocab_size * c.dim
    return tokens, (training_flops_per_token(c, window) / 3 - head) * seen + head * tokens


@pytest.mark.parametrize("protocol", ["window", "stride"])
def test_evaluation(protocol, contender, measuring, record, benchmark):
    """window: 1024 tokens side by side, against loops of 1 and of 8; stride: 1024 every 512."""
    names = {"matmul": "matmul", "ours": f"our {protocol}"}
    names |= (
        {"loop of 8": "plain window 8", "loop": "plain window 1"}
        if protocol == "window"
        else {"loop": "plain stride"}
    )
    players = {name: contender(command) for name, command in names.items()}
    for name in ("matmul", "ours"):
        players[name]()
    turns = rounds_of(players, 2 if measuring else 1, benchmark)
    if not measuring:
        return
    values = each(turns, "seconds")
    tokens, flops = scoring_flops("full", protocol == "stride")
    values["matmul"] = [flops * seconds / (2 * 2048**3) for seconds in values["matmul"]]
    record(
        values,
        measures={
            name: {"tokens_per_second": tokens / statistics.median(v)} for name, v in values.items()
        },
    )
    peaks = {name: v[-1] for name, v in each(turns, "peak_gib").items() if name != "matmul"}
    record({name: [peak] for name, peak in peaks.items()}, unit="peak GiB")
    faster, bound = ratio(values["loop"], values["ours"]), ratio(values["matmul"], values["ours"])
    assert faster >= (1.0 if protocol == "window" else 1.2), (
        f"{protocol}: {faster:.2f} times the loop"
    )
    assert bound >= 0.9, f"{protocol}: {bound:.2f} of the matmuls' bound (target 0.9)"
    if protocol == "window":
        faster = ratio(values["loop of 8"], values["ours"])
        assert faster >= 1.4, f"window: {faster:.2f} times the loop of 8 (target 1.4)"
        assert peaks["ours"] <= 0.4 * peaks["loop of 8"]


def test_evaluation_word(contender, measuring, record, benchmark):
    """word: whole documents, tokenising included, against lm-eval's own Hugging Face model."""
    pytest.importorskip("lm_eval", reason="lm-eval, the peer of this case, is not installed")
    players = {
        name: contender(command)
        for name, command in {"ours": "our word", "lm-eval": "lm-eval word"}.items()
    }
    players["ours"]()
    turns = rounds_of(players, 2 if measuring else 1, benchmark)
    if measuring:
        values = each(turns, "seconds")
        record(values)
        record({name: v[-1:] for name, v in each(turns, "peak_gib").items()}, unit="peak GiB")
        assert (faster := ratio(values["lm-eval"], values["ours"])) >= 1, (
            f"word: {faster:.2f} times lm-eval"
        )

"""Writing with a 135M Llama on the CPU, against transformers' generate.

64 tokens after 32, greedy, fp32.
"""

from __future__ import annotations

import statistics

import pytest

from bench.harness.contender import each, ratio, rounds_of

pytest.importorskip(
    "transformers", reason="transformers, the peer of these cases, is not installed"
)


@pytest.mark.parametrize("rows", [1, 8])
def test_generation(rows, contender, measuring, record, benchmark):
    """Tokens per second of all rows together."""
    from bench.peers.language_models import NEW

    players = {
        "transformers": contender(f"their generate {rows}"),
        "ours": contender(f"our generate {rows}"),
    }
    for player in players.values():
        player()
    turns = rounds_of(players, 5 if measuring else 1, benchmark)
    if not measuring:
        return
    values = each(turns, "seconds")
    record(
        values,
        measures={
            n: {"tokens_per_second": rows * NEW["full"] / statistics.median(v)}
            for n, v in values.items()
        },
    )
    assert ratio(values["transformers"], values["ours"]) >= 1.5

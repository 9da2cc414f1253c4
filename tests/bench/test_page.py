"""docs/benchmarks.md: measured, missing, failed and projected, each shown for what it is."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

from helpers.benchmarks import BENCH, ROOT, row

from bench.harness import page, tables
from bench.scripts.write_page import main


def test_the_page_shows_measured_missing_failed_and_projected_each_for_what_it_is(tmp_path):
    about = {
        "device": "a machine",
        "date": "2026-01-01",
        "hardware": {"cpus": 2},
        "versions": {"torch": "2.13"},
    }
    rows = [
        row("ours", 0.0123, measures={"gb_per_second": 1234.5}),
        row("eager", 0.02, 1.6),
        row("copy", 0.01, 0.82),
        {
            "group": "g",
            "case": "c",
            "peer": "liger",
            "missing": "liger-kernel is not installed",
            "command": "make",
        },
        {
            "group": "g",
            "case": "c",
            "peer": "cut",
            "failed": "Error: out | of memory",
            "command": "make",
        },
    ]
    projected = [
        {
            "group": "p",
            "case": "step",
            "peer": "ours",
            "measures": {"launches": 7},
            "command": "count",
        }
    ]
    for name, kind, its in (("a.json", "measured", rows), ("b.json", "projected", projected)):
        (tmp_path / name).write_text(
            json.dumps({"kind": kind, **about, "rows": its}), encoding="utf-8"
        )
    (tmp_path / "notes.md").write_text(
        "# Notes\n\n## g\n\nWords about g.\n\n## projected\n\nFrom counts.\n", encoding="utf-8"
    )
    text, charts = page.render(tmp_path)
    ours = "0.0123 s, 1,234 GB/s"
    eager = "0.0200, **1.60× (1.60 to 1.60)**"
    assert f"| c | {ours} | {eager} | missing: liger-kernel is not installed |" in text
    assert "FAILED: Error: out \\| of memory" in text
    assert "82.0% (82.0 to 82.0)" in text
    assert (
        text.index("Words about g.")
        < text.index("| c |")
        < text.index("# Projections")
        < text.index("| step | ours | 7 |")
    )
    assert "Reproduce: `make`" in text
    assert "cpus: 2; torch: 2.13." in text
    for svg in charts.values():
        ElementTree.fromstring(svg)
    assert "eager" in charts["a-g.svg"]


def test_the_command_writes_the_page_and_says_what_is_wrong(tmp_path, capsys):
    assert main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 2
    assert "no results in" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    assert main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 2
    assert "a.json is not a result file" in capsys.readouterr().err


def test_docs_benchmarks_is_what_the_results_give():
    text, charts = page.render(BENCH / "results")
    docs = ROOT / "docs" / "benchmarks.md"
    assert docs.read_text(encoding="utf-8") == text, "run python -m bench.scripts.write_page"
    for name, svg in charts.items():
        assert (docs.with_suffix("") / name).read_text(encoding="utf-8") == svg, (
            "run python -m bench.scripts.write_page"
        )


def test_the_short_table_has_ours_its_rate_the_ratios_and_what_is_missing():
    rows = [
        row("ours", 113.0, measures={"tokens_per_second": 290000.0, "mfu": 0.47, "waits": 0}),
        row("peer", 226.0, 2.0),
        {"group": "g", "case": "c", "peer": "liger", "missing": "not installed"},
        {"group": "g", "case": "d", "peer": "liger", "missing": "not installed"},
        {"group": "g", "case": "gradients", "peer": "ours", "measures": {"worst": 0.25}},
    ]
    table = tables.short_table(rows)
    assert "113 s   290,000 tokens/s, 0.470 MFU, peer 2.00×" in table
    assert "missing liger, 2 times: not installed" in table
    assert "0.250 worst" in table

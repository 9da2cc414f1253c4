"""docs/benchmarks.md and its charts, from the JSON files that the benchmarks write.

results.py says what a row is. The text under a heading `## GROUP` of notes.md in the same folder
stands above that group's tables. The same files always give the same page.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from bench.harness.tables import Row, measured, names, plain, title
from fastlm.charts import curves, dots
from fastlm.errors import UserError


def notes(folder: Path) -> dict[str, str]:
    """The text under each `## GROUP` of notes.md."""
    path = folder / "notes.md"
    parts = path.read_text(encoding="utf-8").split("\n## ")[1:] if path.is_file() else []
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in parts}


def section(
    group: str, rows: list[Row], words: str, stem: str, charts: dict[str, str]
) -> list[str]:
    """Heading, words, table, the commands, the charts."""
    out = [f"#### {title(group)}", ""]
    if words:
        out += [words, ""]
    compared = [row for row in rows if "ratio" in row]
    lines = [row for row in rows if "axis" in row]
    out += [*(measured(rows) if any("median" in row for row in rows) else plain(rows)), ""]
    out += [f"Reproduce: {', '.join(f'`{c}`' for c in names(rows, 'command'))}", ""]
    chart = f"{stem}-{group.replace('_', '-').replace(' ', '-')}"
    if compared and not lines:
        charts[f"{chart}.svg"] = dots(title(group), compared)
        out += [f"![Ratios of {title(group)}](benchmarks/{chart}.svg)", ""]
    for axis in names(lines, "axis"):
        name = f"{chart}-{axis.replace(' ', '-')}.svg"
        charts[name] = curves(axis, [row for row in lines if row["axis"] == axis])
        out += [f"![Cost by {axis}](benchmarks/{name})", ""]
    return out


def render(folder: Path) -> tuple[str, dict[str, str]]:
    """The text of docs/benchmarks.md, and its charts by file name.

    Raises UserError where there are no results or a file is broken.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"no results in {folder}; write some: pytest bench/ --benchmark")
    words = notes(folder)
    charts: dict[str, str] = {}
    out = [
        "<!-- Written by `python -m bench.scripts.write_page` from bench/results; "
        "the words are in bench/results/notes.md. -->",
        "",
        "# Benchmarks",
        "",
        words.get("method", ""),
        "",
    ]
    for kind, heading in (
        ("measured", "Measured"),
        ("projected", "Projections: counted, not measured"),
    ):
        out += [f"## {heading}", "", words.get(kind, ""), ""]
        for path in files:
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as e:
                raise UserError(f"{path} is not a result file: {e}") from None
            if found.get("kind") != kind:
                continue
            facts = [
                f"{k.replace('_', ' ')}: {v}"
                for part in ("hardware", "versions")
                for k, v in found[part].items()
            ]
            out += [f"### {found['device']}, {found['date']}", "", "; ".join(facts) + ".", ""]
            groups: dict[str, list[Row]] = defaultdict(list)
            for row in found["rows"]:
                groups[row["group"]].append(row)
            for group, rows in groups.items():
                out += section(group, rows, words.get(group, ""), path.stem, charts)
    return "\n".join(out).rstrip() + "\n", charts


def write(folder: Path, out: Path) -> list[Path]:
    """Write the page and its charts, into a folder named like the page beside it.

    Returns what was written.
    """
    text, charts = render(folder)
    images = out.with_suffix("")
    images.mkdir(parents=True, exist_ok=True)
    for old in images.glob("*.svg"):
        if old.name not in charts:
            old.unlink()
    out.write_text(text, encoding="utf-8")
    for name, svg in charts.items():
        (images / name).write_text(svg, encoding="utf-8")
    return [out, *(images / name for name in charts)]

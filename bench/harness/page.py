"""`fastlm bench report`: the tables and charts of docs/benchmarks.md from the JSON files that the benchmarks write.

It reads JSON and nothing else; bench/results.py says what a row is. Words come from notes.md in the same folder: the text
under its heading `## GROUP` stands above that group's tables. Everything here is plain text out of plain values, so the same
files always give the same page.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from fastlm.bench_charts import curves, dots
from fastlm.config import BenchConfig
from fastlm.errors import UserError

Row = dict[str, Any]
CEILINGS = ("copy", "matmul")
UNITS = {
    "tokens_per_second": "tokens/s", "gb_per_second": "GB/s", "tflop_per_second": "TFLOP/s", "gflops": "GFLOP/s",
    "gb": "GB", "mfu": "MFU", "joules_per_token": "J/token", "mb_per_s": "MB/s",
    "saved_gb": "GB saved", "state_gb": "GB state", "peak_gib": "GiB peak",
}  # fmt: skip
SHOWN = ("tokens_per_second", "mfu", "gb_per_second", "tflop_per_second")  # in the short table


def number(value: float) -> str:
    """Three figures, thousands with commas; whole numbers as they are."""
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def ratio(row: Row) -> str:
    """How many times ours a peer takes, or the share of a ceiling that ours reaches, with the spread of the rounds."""
    r, scale, unit = row["ratio"], *((100, "%") if row["peer"] in CEILINGS else (1, "×"))
    spread = f" ({number(scale * r['q10'])} to {number(scale * r['q90'])})" if row["rounds"] > 1 else ""
    return f"{number(scale * r['median'])}{unit}{spread}"


def cell(row: Row | None) -> str:
    """One contender in one case."""
    if row is None:
        return ""
    if "failed" in row:
        return f"FAILED: {row['failed']}"
    if "missing" in row:
        return f"missing: {row['missing']}"
    unit = f" {row['unit']}" if row["peer"] == "ours" and "median" in row else ""
    words = [f"{number(row['median'])}{unit}"] if "median" in row else []
    words += [f"**{ratio(row)}**"] if "ratio" in row else []
    words += [f"{number(value)} {UNITS.get(name, name.replace('_', ' '))}" for name, value in row.get("measures", {}).items()]
    return ", ".join(words)


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    escaped = [[c.replace("|", "\\|") for c in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *escaped)]


def names(rows: list[Row], field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def measured(rows: list[Row]) -> list[str]:
    """A line for each case and unit, a column for each contender."""
    found = {(row["case"], row.get("unit", ""), row["peer"]): row for row in rows}
    rest = [p for p in names(rows, "peer") if p not in ("ours", "case") and p not in CEILINGS]
    peers = [p for p in ("ours", *rest, *CEILINGS, "case") if p in names(rows, "peer")]
    lines = []
    for case in names(rows, "case"):
        units = [u for u in dict.fromkeys(u for c, u, _ in found if c == case) if u]
        for unit in units or [""]:  # what is missing or failed has no unit: it stands in the first line
            cells = [found.get((case, unit, p)) or (found.get((case, "", p)) if unit in units[:1] else None) for p in peers]
            lines.append([case, *map(cell, cells)])
    return table(["case", *("not run" if p == "case" else p for p in peers)], lines)


def plain(rows: list[Row]) -> list[str]:
    """A line for each case and contender, a column for each figure."""
    figures = list(dict.fromkeys(name for row in rows for name in row.get("measures", {})))
    lines = []
    for row in rows:
        values = row.get("measures", {})
        cells = [number(values[f]) if f in values else "" for f in figures]
        lines.append([row["case"], row["peer"], *(cells if values else [cell(row), *cells[1:]])])
    return table(["case", "contender", *(UNITS.get(f, f.replace("_", " ")) for f in figures)], lines)


def title(group: str) -> str:
    words = group.replace("_", " ")
    return words[0].upper() + words[1:] if not words.startswith(("cpu", "gpu")) else words[:3].upper() + words[3:]


def short_table(rows: list[Row]) -> str:
    """Every case in a few characters: our figure, each contender's ratio, what is missing, failures last: for `make gpu`."""
    lines = []
    for case, unit in dict.fromkeys((row["case"], row["unit"]) for row in rows if "median" in row):
        mine = [row for row in rows if row["case"] == case and row.get("unit") == unit]
        first = next((row for row in mine if row["peer"] == "ours"), mine[0])
        name = "" if first["peer"] == "ours" else f"{first['peer']} "
        rate = [f"{number(v)} {UNITS[k]}" for k, v in first.get("measures", {}).items() if k in SHOWN]
        shown = [f"{row['peer']} {ratio(row).split(' (')[0]}" for row in mine if "ratio" in row]
        lines.append(f"{case:38} {name + number(first['median']):>12} {unit}   {', '.join(rate + shown)}")
    alone = [row for row in rows if row.get("measures") and "median" not in row and row["group"] != "correctness"]
    lines += [f"{row['case']:38} {cell(row)}" for row in alone]
    tests = [row["measures"] for row in rows if row["group"] == "correctness" and "measures" in row]
    if tests:
        lines.append("tests: " + ", ".join(f"{sum(t[n] for t in tests):.0f} {n}" for n in ("passed", "failed", "skipped")))
    gone = Counter((row["peer"], row["missing"]) for row in rows if "missing" in row)
    lines += [f"missing {peer}, {count} times: {why[:120]}" for (peer, why), count in gone.items()]
    return "\n".join(lines + [f"FAILED {row['case']}, {row['peer']}: {row['failed'][:120]}" for row in rows if "failed" in row])


def notes(folder: Path) -> dict[str, str]:
    """The text under each `## GROUP` of notes.md."""
    path = folder / "notes.md"
    parts = path.read_text(encoding="utf-8").split("\n## ")[1:] if path.is_file() else []
    return {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in parts}


def section(group: str, rows: list[Row], words: str, stem: str, charts: dict[str, str]) -> list[str]:
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


def page(folder: Path) -> tuple[str, dict[str, str]]:
    """(docs/benchmarks.md, its charts by file name). Raises UserError where there are no results or a file is broken."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"no results in {folder}; write some: pytest bench/ --benchmark")
    words = notes(folder)
    charts: dict[str, str] = {}
    out = ["<!-- Written by `fastlm bench report` from bench/results; the words are in bench/results/notes.md. -->", "",
           "# Benchmarks", "", words.get("method", ""), ""]  # fmt: skip
    for kind, heading in (("measured", "Measured"), ("projected", "Projections: counted, not measured")):
        out += [f"## {heading}", "", words.get(kind, ""), ""]
        for path in files:
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as e:
                raise UserError(f"{path} is not a result file: {e}") from None
            if found.get("kind") != kind:
                continue
            facts = [f"{k.replace('_', ' ')}: {v}" for part in ("hardware", "versions") for k, v in found[part].items()]
            out += [f"### {found['device']}, {found['date']}", "", "; ".join(facts) + ".", ""]
            groups: dict[str, list[Row]] = defaultdict(list)
            for row in found["rows"]:
                groups[row["group"]].append(row)
            for group, rows in groups.items():
                out += section(group, rows, words.get(group, ""), path.stem, charts)
    return "\n".join(out).rstrip() + "\n", charts


def write(folder: Path, out: Path) -> list[Path]:
    """Write the page and its charts, into a folder named like the page beside it. Returns what was written."""
    text, charts = page(folder)
    images = out.with_suffix("")
    images.mkdir(parents=True, exist_ok=True)
    for old in images.glob("*.svg"):
        if old.name not in charts:
            old.unlink()
    out.write_text(text, encoding="utf-8")
    for name, svg in charts.items():
        (images / name).write_text(svg, encoding="utf-8")
    return [out, *(images / name for name in charts)]


def report(cfg: BenchConfig) -> int:
    """fastlm bench report: write the page, and say where."""
    written = write(Path(cfg.results), Path(cfg.out))
    print(f"{written[0]} and {len(written) - 1} charts")
    return 0

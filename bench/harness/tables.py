"""Result rows as tables: in Markdown for docs/benchmarks.md, and short for `make gpu`."""

from __future__ import annotations

from collections import Counter
from typing import Any

Row = dict[str, Any]
CEILINGS = ("copy", "matmul")
UNITS = {
    "tokens_per_second": "tokens/s",
    "gb_per_second": "GB/s",
    "tflop_per_second": "TFLOP/s",
    "gflops": "GFLOP/s",
    "gb": "GB",
    "mfu": "MFU",
    "joules_per_token": "J/token",
    "mb_per_s": "MB/s",
    "saved_gb": "GB saved",
    "state_gb": "GB state",
    "peak_gib": "GiB peak",
}
OUTCOMES = ("passed", "failed", "skipped")
SHOWN = ("tokens_per_second", "mfu", "gb_per_second", "tflop_per_second")  # in the short table


def number(value: float) -> str:
    """Three figures, thousands with commas; whole numbers as they are."""
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def ratio(row: Row) -> str:
    """How many times ours a peer takes, or the share of a ceiling that ours reaches.

    With the spread of the rounds.
    """
    is_ceiling = row["peer"] in CEILINGS
    scale = 100 if is_ceiling else 1
    median, low, high = (number(scale * row["ratio"][name]) for name in ("median", "q10", "q90"))
    text = median + ("%" if is_ceiling else "×")
    return f"{text} ({low} to {high})" if row["rounds"] > 1 else text


def cell(row: Row | None) -> str:
    """One contender in one case."""
    if row is None:
        return ""
    for why in ("failed", "missing"):
        if why in row:
            return f"{why.upper() if why == 'failed' else why}: {row[why]}"
    words = []
    if "median" in row:
        unit = f" {row['unit']}" if row["peer"] == "ours" else ""
        words.append(number(row["median"]) + unit)
    if "ratio" in row:
        words.append(f"**{ratio(row)}**")
    for name, value in row.get("measures", {}).items():
        words.append(f"{number(value)} {in_words(name)}")
    return ", ".join(words)


def in_words(measure: str) -> str:
    return UNITS.get(measure, measure.replace("_", " "))


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    escaped = [[c.replace("|", "\\|") for c in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *escaped)]


def names(rows: list[Row], field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def measured(rows: list[Row]) -> list[str]:
    """A line for each case and unit, a column for each contender."""
    by_place = {(row["case"], row.get("unit", ""), row["peer"]): row for row in rows}
    present = names(rows, "peer")
    others = [peer for peer in present if peer not in ("ours", "case", *CEILINGS)]
    peers = [peer for peer in ("ours", *others, *CEILINGS, "case") if peer in present]
    lines = []
    for case in names(rows, "case"):
        all_units = dict.fromkeys(unit for named, unit, _ in by_place if named == case)
        units = [unit for unit in all_units if unit] or [""]
        for unit in units:
            cells = []
            for peer in peers:
                row = by_place.get((case, unit, peer))
                if row is None and unit == units[0]:
                    row = by_place.get((case, "", peer))  # missing or failed: it has no unit
                cells.append(cell(row))
            lines.append([case, *cells])
    return table(["case", *("not run" if peer == "case" else peer for peer in peers)], lines)


def plain(rows: list[Row]) -> list[str]:
    """A line for each case and contender, a column for each figure."""
    figures = list(dict.fromkeys(name for row in rows for name in row.get("measures", {})))
    lines = []
    for row in rows:
        values = row.get("measures", {})
        cells = [number(values[name]) if name in values else "" for name in figures]
        if not values:
            cells[:1] = [cell(row)]
        lines.append([row["case"], row["peer"], *cells])
    return table(["case", "contender", *map(in_words, figures)], lines)


def title(group: str) -> str:
    words = group.replace("_", " ")
    return (
        words[0].upper() + words[1:]
        if not words.startswith(("cpu", "gpu"))
        else words[:3].upper() + words[3:]
    )


def short_table(rows: list[Row]) -> str:
    """Every case in a few characters.

    Our figure, each contender's ratio, what is missing, failures last: for `make gpu`.
    """
    lines = []
    for case, unit in dict.fromkeys((row["case"], row["unit"]) for row in rows if "median" in row):
        contenders = [row for row in rows if row["case"] == case and row.get("unit") == unit]
        lines.append(short_line(case, unit, contenders))
    for row in rows:
        if row.get("measures") and "median" not in row and row["group"] != "correctness":
            lines.append(f"{row['case']:38} {cell(row)}")
    tests = [row["measures"] for row in rows if row["group"] == "correctness" and "measures" in row]
    if tests:
        totals = {name: sum(test[name] for test in tests) for name in OUTCOMES}
        lines.append("tests: " + ", ".join(f"{n:.0f} {name}" for name, n in totals.items()))
    missing = Counter((row["peer"], row["missing"]) for row in rows if "missing" in row)
    for (peer, why), count in missing.items():
        lines.append(f"missing {peer}, {count} times: {why[:120]}")
    for row in rows:
        if "failed" in row:
            lines.append(f"FAILED {row['case']}, {row['peer']}: {row['failed'][:120]}")
    return "\n".join(lines)


def short_line(case: str, unit: str, contenders: list[Row]) -> str:
    """One case: our figure (or the first contender's), its rates, and the others' ratios."""
    first = next((row for row in contenders if row["peer"] == "ours"), contenders[0])
    figure = number(first["median"])
    if first["peer"] != "ours":
        figure = f"{first['peer']} {figure}"
    shown = []
    for name, value in first.get("measures", {}).items():
        if name in SHOWN:
            shown.append(f"{number(value)} {UNITS[name]}")
    for row in contenders:
        if "ratio" in row:
            shown.append(f"{row['peer']} {ratio(row).split(' (')[0]}")
    return f"{case:38} {figure:>12} {unit}   {', '.join(shown)}"

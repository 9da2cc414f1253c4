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
    r, scale, unit = row["ratio"], *((100, "%") if row["peer"] in CEILINGS else (1, "×"))
    spread = (
        f" ({number(scale * r['q10'])} to {number(scale * r['q90'])})" if row["rounds"] > 1 else ""
    )
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
    words += [
        f"{number(value)} {UNITS.get(name, name.replace('_', ' '))}"
        for name, value in row.get("measures", {}).items()
    ]
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
        for unit in units or [
            ""
        ]:  # what is missing or failed has no unit: it stands in the first line
            cells = [
                found.get((case, unit, p))
                or (found.get((case, "", p)) if unit in units[:1] else None)
                for p in peers
            ]
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
    return table(
        ["case", "contender", *(UNITS.get(f, f.replace("_", " ")) for f in figures)], lines
    )


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
        mine = [row for row in rows if row["case"] == case and row.get("unit") == unit]
        first = next((row for row in mine if row["peer"] == "ours"), mine[0])
        name = "" if first["peer"] == "ours" else f"{first['peer']} "
        rate = [
            f"{number(v)} {UNITS[k]}" for k, v in first.get("measures", {}).items() if k in SHOWN
        ]
        shown = [f"{row['peer']} {ratio(row).split(' (')[0]}" for row in mine if "ratio" in row]
        lines.append(
            f"{case:38} {name + number(first['median']):>12} {unit}   {', '.join(rate + shown)}"
        )
    alone = [
        row
        for row in rows
        if row.get("measures") and "median" not in row and row["group"] != "correctness"
    ]
    lines += [f"{row['case']:38} {cell(row)}" for row in alone]
    tests = [row["measures"] for row in rows if row["group"] == "correctness" and "measures" in row]
    if tests:
        lines.append(
            "tests: "
            + ", ".join(
                f"{sum(t[n] for t in tests):.0f} {n}" for n in ("passed", "failed", "skipped")
            )
        )
    gone = Counter((row["peer"], row["missing"]) for row in rows if "missing" in row)
    lines += [f"missing {peer}, {count} times: {why[:120]}" for (peer, why), count in gone.items()]
    return "\n".join(
        lines
        + [
            f"FAILED {row['case']}, {row['peer']}: {row['failed'][:120]}"
            for row in rows
            if "failed" in row
        ]
    )

"""Two charts as SVG text: ratios as dots with their spread, and costs as curves.

The same rows always give the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any

Row = dict[str, Any]
COLOURS = ("#0b6e99", "#d1495b", "#8a5a00", "#5b3f8c", "#2e7d32", "#555555", "#b0006d")
FONT = 'font-family="sans-serif" font-size="11"'


def text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {FONT} {more}>{escape(words)}</text>'
    )


def line(
    x1: float, y1: float, x2: float, y2: float, colour: str = "#dddddd", width: float = 1
) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    inside = [
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        *parts,
    ]
    return "\n".join([head, *inside, "</svg>"]) + "\n"


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten, from just below low to just above high."""
    marks = [m * 10.0**e for e in range(-6, 10) for m in (1, 2, 5)]
    first = max((i for i, t in enumerate(marks) if t <= low), default=0)
    last = min((i for i, t in enumerate(marks) if t >= high), default=len(marks) - 1)
    return marks[first : last + 1]


def legend(peers: list[str], y: float) -> list[str]:
    parts, x = [], 20.0
    for i, peer in enumerate(peers):
        parts += [
            f'<circle cx="{x:.1f}" cy="{y - 4:.1f}" r="4" fill="{COLOURS[i % len(COLOURS)]}"/>',
            text(x + 8, y, peer),
        ]
        x += 24 + 6.3 * len(peer)
    return parts


def dots(title: str, rows: list[Row]) -> str:
    """Each case a line, each contender a dot at its ratio to ours.

    A bar goes from the tenth to the ninetieth percentile.
    """
    cases = list(dict.fromkeys((row["case"], row["unit"]) for row in rows))
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    left, right, top, step = 20 + 6.2 * max(len(f"{c}, {u}") for c, u in cases), 20.0, 58.0, 16.0
    width, height = left + 460 + right, top + step * len(cases) + 34
    marks = ticks(
        min(1, *(r["ratio"]["q10"] for r in rows)), max(1, *(r["ratio"]["q90"] for r in rows))
    )
    span = math.log(marks[-1] / marks[0]) or 1.0

    def at(value: float) -> float:
        return left + 460 * math.log(value / marks[0]) / span

    parts = [
        text(
            20,
            18,
            f"{title}: contender / ours; right of 1, ours is better",
            more='font-weight="bold"',
        )
    ]
    parts += legend(peers, 38)
    for mark in marks:
        parts += [
            line(at(mark), top - 6, at(mark), height - 28, "#444444" if mark == 1 else "#dddddd")
        ]
        parts += [text(at(mark), height - 14, f"{mark:g}", "middle")]
    for i, (case, unit) in enumerate(cases):
        y = top + step * i + 6
        parts.append(text(left - 8, y + 4, f"{case}, {unit}", "end"))
        for row in rows:
            if (row["case"], row["unit"]) == (case, unit):
                colour, r = COLOURS[peers.index(row["peer"]) % len(COLOURS)], row["ratio"]
                parts.append(line(at(r["q10"]), y, at(r["q90"]), y, colour, 2))
                parts.append(
                    f'<circle cx="{at(r["median"]):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
                )
    return svg(width, height, title, parts)


def curves(axis: str, rows: list[Row]) -> str:
    """The median of each contender over the axis, both logarithmic.

    The unit is that of the first row.
    """
    unit = rows[0]["unit"]
    rows = [row for row in rows if row.get("unit") == unit]
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    across, up = ([row[key] for row in rows] for key in ("at", "median"))
    left, top, wide, tall = 70.0, 58.0, 460.0, 220.0
    low, high = min(across), max(across)
    marks = ticks(min(up), max(up))

    def point(row: Row) -> tuple[float, float]:
        x = left + wide * math.log(row["at"] / low) / (math.log(high / low) or 1.0)
        return x, top + tall * (
            1 - math.log(row["median"] / marks[0]) / (math.log(marks[-1] / marks[0]) or 1.0)
        )

    parts = [text(20, 18, f"{unit} by {axis}", more='font-weight="bold"'), *legend(peers, 38)]
    for mark in marks:
        y = point({"at": low, "median": mark})[1]
        parts += [line(left, y, left + wide, y), text(left - 8, y + 4, f"{mark:g}", "end")]
    for value in sorted(set(across)):
        x = point({"at": value, "median": marks[0]})[0]
        parts += [line(x, top, x, top + tall), text(x, top + tall + 16, f"{value:,g}", "middle")]
    parts.append(text(left + wide / 2, top + tall + 34, axis, "middle"))
    for i, peer in enumerate(peers):
        points = [point(row) for row in sorted(rows, key=lambda r: r["at"]) if row["peer"] == peer]
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return svg(left + wide + 30, top + tall + 48, f"{unit} by {axis}", parts)

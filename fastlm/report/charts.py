"""The charts of the report, as plain values that page.js draws."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from fastlm.report.runs import RunRecord
from fastlm.report.scores import Scores, by_doubling

POINTS = 400  # of a curve; more steps are averaged

STAGE_WORDS = {"pretrain": "Pretraining", "sft": "SFT", "dpo": "DPO"}


def charts(records: list[RunRecord], scores: dict[str, Scores]) -> list[dict[str, Any]]:
    """Every chart that there is something to show in.

    A chart has a title, a note, the names of its axes with units, whether they are logarithmic, and
    curves: a name, y, and x by tokens, hours and steps, or one x where `x` of the chart says so.
    """
    made = []
    for stage, words in STAGE_WORDS.items():
        runs = [record for record in records if record.stage == stage]
        unit = "nats a pair" if stage == "dpo" else "nats a token"
        note = "Lines: training steps. Diamonds: the whole held-out data."
        if any(run.has_shortlist for run in runs):
            note += (
                " Training steps marked “shortlist” choose among a part of the vocabulary only, so"
                " their loss lies below that of the held-out data."
            )
        losses = [curve for run in runs for curve in loss_curves(run)]
        made.append(chart(f"{words}: loss", f"loss, {unit}", losses, note))
    pairs = [record for record in records if record.stage == "dpo"]
    made += [
        chart(
            "DPO: chosen answers preferred",
            "share of pairs",
            metric(pairs, "rewards/accuracies"),
            "Pairs whose chosen answer gained more than the rejected one.",
        ),
        chart(
            "DPO: reward margin",
            "margin, nats",
            metric(pairs, "rewards/margins"),
            "Reward of the chosen answer less that of the rejected one.",
        ),
        chart(
            "Speed",
            "tokens a second",
            metric(records, "tokens_per_s"),
            "Tokens that were trained on; padding does not count.",
            from_zero=True,
        ),
        chart("Memory", "peak, GiB", metric(records, "peak_gib"), "The most so far.", True),
        chart("Power", "watts", metric(records, "watts"), "Of the first GPU.", True),
        chart("Learning rate", "learning rate", metric(records, "lr"), "Of the matrices."),
        chart(
            "Gradient norm",
            "norm of all gradients",
            metric(records, "grad_norm"),
            "Before clipping.",
        ),
        profile(
            "Loss by position",
            "tokens of context",
            scores,
            lambda s: s.position,
            "A model that uses its context is better further on.",
        ),
        profile(
            "Loss by frequency",
            "times that the token is in the scored text",
            scores,
            lambda s: s.occurrences,
            "Rare tokens are hard; where two models differ shows what one has learnt.",
        ),
    ]
    return [one for one in made if one["curves"]]


def chart(
    title: str, y: str, curves: list[dict[str, Any]], note: str, from_zero: bool = False
) -> dict[str, Any]:
    return {
        "title": title,
        "y": y,
        "x": "",
        "log_x": False,
        "from_zero": from_zero,
        "note": note,
        "curves": curves,
    }


def loss_curves(run: RunRecord) -> list[dict[str, Any]]:
    """The training loss, and the validations as marks of the same colour."""
    words = "training, shortlist" if run.has_shortlist else "training"
    lines = curve(run, run.steps, "loss", f"{run.name}, {words}")
    marks = curve(run, run.validations, "validation_loss", f"{run.name}, held out")
    return lines + [one | {"marks": True} for one in marks]


def metric(records: list[RunRecord], key: str) -> list[dict[str, Any]]:
    return [one for run in records for one in curve(run, run.steps, key, run.name)]


def curve(run: RunRecord, rows: list[dict[str, Any]], key: str, name: str) -> list[dict[str, Any]]:
    """The course of one figure, averaged down to POINTS; nothing where no row has it."""
    rows = [row for row in rows if isinstance(row.get(key), float | int)]
    if not rows:
        return []
    tokens = {row["step"]: row["tokens"] for row in run.steps}
    seconds = accumulate(row["seconds"] for row in run.steps)
    hours = dict(zip(tokens, (s / 3600 for s in seconds), strict=True))
    tokens[0] = hours[0] = 0
    size = -(-len(rows) // POINTS)
    groups = [rows[at : at + size] for at in range(0, len(rows), size)]
    last = [group[-1]["step"] for group in groups]
    known = [step for step in last if step in tokens]
    groups = [group for group, step in zip(groups, last, strict=True) if step in tokens]
    return [
        {
            "name": name,
            "run": run.name,
            "marks": False,
            "step": known,
            "tokens": [tokens[step] for step in known],
            "hours": [hours[step] for step in known],
            "y": [sum(row[key] for row in group) / len(group) for group in groups],
        }
    ]


def profile(
    title: str,
    x: str,
    scores: dict[str, Scores],
    values: Callable[[Scores], Any],
    note: str,
) -> dict[str, Any]:
    """Mean loss over ranges of a figure of each scored token, each range twice as wide."""
    curves = []
    for name, score in scores.items():
        ranges = by_doubling(values(score), score.nats)
        text = [
            f"{a} to {b}: {n:,} tokens" if b > a else f"{a}: {n:,} tokens" for a, b, _, n in ranges
        ]
        curves.append(
            {
                "name": name,
                "run": name,
                "marks": False,
                "x": [(a * b) ** 0.5 for a, b, _, _ in ranges],
                "y": [mean for _, _, mean, _ in ranges],
                "text": text,
            }
        )
    made = chart(title, "loss, nats a token", curves, note)
    return made | {"x": x, "log_x": True}

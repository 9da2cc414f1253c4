"""The report as one HTML file, which asks the network for nothing, and as Markdown."""

from __future__ import annotations

import html
import json
import statistics
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastlm.report.charts import STAGE_WORDS, charts
from fastlm.report.runs import RunRecord
from fastlm.report.scores import Scores

PUBLISHED = [("GPT-2", 40.64), ("pretrained", 27.03), ("+ SFT", 34.14), ("+ DPO", 34.32)]
PUBLISHED_NOTE = (
    "A published pipeline has, on WikiText-2: "
    + ", ".join(f"{name} {value:.2f}" for name, value in PUBLISHED)
    + ". Its model has 253M parameters and it scores single lines, so its figures can be compared"
    " with another 253M model's by the protocol “line” on the same text, and with nothing else."
)


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    table: rows that a pipeline wrote, its settings in `settings`. scores: by the run's name.
    scored_text: the name of the text that they are of. unscored: why there are none. machine: where
    the models were scored.
    """

    records: list[RunRecord]
    table: list[dict[str, Any]]
    settings: dict[str, Any]
    scores: dict[str, Scores]
    scored_text: str
    unscored: str
    machine: str

    @property
    def title(self) -> str:
        names = [record.name for record in self.records]
        return ", ".join(names) if len(names) < 4 else f"{len(names)} runs"


Table = tuple[list[str], list[list[str]]]  # head, rows


# ------------------------------------------------------------------------------ what is said


def runs_table(report: Report) -> Table:
    """A column for each run: its size, how far it came, what it reached and what it took."""
    rows = {
        "stage": [STAGE_WORDS[record.stage] for record in report.records],
        "parameters": [number(record.parameters, ",d") for record in report.records],
        "steps": [progress(record) for record in report.records],
        "tokens trained": [number(last(record, "tokens"), ",d") for record in report.records],
        "held-out loss, first to last": [losses(record) for record in report.records],
        "held-out perplexity": [
            number(last_validation(record, "perplexity"), ",.2f") for record in report.records
        ],
        "tokens a second": [
            number(usual(record, "tokens_per_s"), ",.0f") for record in report.records
        ],
        "hours": [
            number(sum(row["seconds"] for row in record.steps) / 3600, ".2f")
            for record in report.records
        ],
        "peak memory, GiB": [number(last(record, "peak_gib"), ".1f") for record in report.records],
        "perplexity of the scored text": [
            number(score.perplexity, ",.2f") for score in report.scores.values()
        ],
    }
    head = ["run", *(record.name for record in report.records)]
    return head, [[name, *cells] for name, cells in rows.items() if any(cells)]


def progress(record: RunRecord) -> str:
    """Steps done, and how many there are to be."""
    planned = record.state.get("steps") or record.settings.get("steps")
    return f"{last(record, 'step') or 0:,}" + (f" of {planned:,}" if planned else "")


def losses(record: RunRecord) -> str:
    """The held-out loss at the first validation and at the last."""
    found = [row["validation_loss"] for row in record.validations]
    return f"{found[0]:.4f} to {found[-1]:.4f}" if found else ""


def last(record: RunRecord, name: str) -> Any:
    """A figure of the last step; None before the first one."""
    return record.steps[-1].get(name) if record.steps else None


def last_validation(record: RunRecord, name: str) -> float | None:
    return record.validations[-1].get(f"validation_{name}") if record.validations else None


def usual(record: RunRecord, name: str) -> float | None:
    """The median over the steps, the first left out: it compiles and warms up."""
    values = [row[name] for row in record.steps[1:] if name in row]
    return statistics.median(values) if values else None


def pipeline_table(report: Report) -> Table:
    """What each stage of a pipeline did, as the pipeline's own table has it."""
    protocols = list(report.table[0]["perplexity"])
    first = report.table[0]
    head = ["model", "parameters", *(f"perplexity, {name}" for name in protocols)]
    head += [
        f"against {first['model']}",
        "held-out answers, perplexity",
        "prefers the chosen answer",
    ]
    rows = []
    for row in report.table:
        values = [row["perplexity"].get(name, {}).get("perplexity") for name in protocols]
        change = values[0] / first["perplexity"][protocols[0]]["perplexity"] - 1
        rows.append(
            [
                row["model"],
                number(row["parameters"], ",d"),
                *(number(value, ",.2f") for value in values),
                "" if row is first else f"{change:+.0%}",
                number(row["answer_perplexity"], ",.2f"),
                number(row["prefers_chosen"], ".1%"),
            ]
        )
    return head, rows


def pipeline_note(report: Report) -> str:
    names = {stage: report.settings.get(stage, {}).get("data", "") for stage in ("sft", "dpo")}
    return (
        f"Perplexity: of {report.table[0]['text']} (SHA-256 {report.table[0]['text_sha256']})."
        f" Held-out answers: of {names['sft']}. Preferences: pairs of {names['dpo']} whose chosen"
        f" answer has the higher log-probability a token. {PUBLISHED_NOTE}"
    )


def scored_note(report: Report) -> str:
    """What the models were scored on for this page, or why they were not."""
    if not report.scores:
        return f"The models were not loaded for this page: {report.unscored}."
    tokens = {len(score.nats) for score in report.scores.values()}
    windows = {score.window for score in report.scores.values()}
    counts = " or ".join(f"{n:,}" for n in sorted(tokens))
    lengths = " or ".join(f"{n:,}" for n in sorted(windows))
    return (
        f"Each run's best checkpoint was loaded and scored on the first {counts} held-out tokens of"
        f" {report.scored_text}, in windows of {lengths} tokens side by side, on {report.machine}."
        " This is less text than fastlm eval scores, and only models with one tokenizer can be"
        " compared by it."
    )


MEASURED_NOTE = (
    "Speed, memory and power are what the run itself logged, step by step; the speed in the table"
    " is the median of all steps but the first. Hours are those of training steps: compiling"
    " counts, validating and saving do not."
)


def number(value: float | None, form: str) -> str:
    """A figure in Python's format `form`; nothing where there is none."""
    return "" if value is None else format(value, form)


# ---------------------------------------------------------------------------------- Markdown


def markdown(report: Report) -> str:
    """The tables, samples and settings; the curves are in the HTML page alone."""
    parts = [f"# {report.title}", markdown_table(runs_table(report)), MEASURED_NOTE]
    if report.table:
        parts += ["## What each stage did", markdown_table(pipeline_table(report))]
        parts.append(pipeline_note(report))
    parts += ["## Samples", scored_note(report)]
    for name, score in report.scores.items():
        parts.append(f"### {name}")
        parts += [fenced(prompt + text) for prompt, text in score.samples]
    parts.append("## Settings")
    parts += [f"### {record.name}\n\n{fenced(record.text)}" for record in report.records]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def fenced(text: str) -> str:
    """The text as a block of code; the fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


# -------------------------------------------------------------------------------------- HTML


def page(report: Report, library: str = "") -> str:
    """The whole page: style, script and the charting library are inside.

    library: the path that the charting library is served at instead; such a page updates itself.
    """
    from plotly.offline import get_plotlyjs

    made = charts(report.records, report.scores)
    names = [record.name for record in report.records]
    data = {"runs": names, "charts": made, "live": bool(library)}
    plotly = (
        f'<script src="{library}"></script>' if library else f"<script>{get_plotlyjs()}</script>"
    )
    resources = files("fastlm.report")
    style = (resources / "page.css").read_text(encoding="utf-8")
    script = (resources / "page.js").read_text(encoding="utf-8")
    sections = [("runs", "Runs", html_table(runs_table(report)) + note(MEASURED_NOTE))]
    if report.table:
        stages = html_table(pipeline_table(report)) + note(pipeline_note(report))
        sections.insert(0, ("stages", "What each stage did", stages))
    sections += [
        ("curves", "Curves", axis_choice() + figures(made)),
        ("samples", "Samples", note(scored_note(report)) + samples(report)),
        ("settings", "Settings", settings(report)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{title}</h2>{inside}</section>' for key, title, inside in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="fastlm report">
<link rel="icon" href="data:,">
<title>{html.escape(report.title)}</title>
<style>
{style}</style>
</head>
<body>
<header><h1>{html.escape(report.title)}</h1><nav>{links}</nav></header>
<main>{body}</main>
<footer id="footer">Written by fastlm report.</footer>
<script type="application/json" id="data">{in_script(data)}</script>
{plotly}
<script>
{script}</script>
</body>
</html>
"""


def in_script(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def html_table(table: Table) -> str:
    head, rows = table
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return f'<div class="scroll" tabindex="0"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def axis_choice() -> str:
    choices = {"tokens": "tokens", "hours": "hours", "step": "steps"}
    inputs = "".join(
        f'<label><input type="radio" name="axis" value="{value}"{" checked" * (value == "tokens")}>'
        f" {words}</label>"
        for value, words in choices.items()
    )
    return f"<fieldset><legend>Across:</legend>{inputs}</fieldset>"


def figures(made: list[dict[str, Any]]) -> str:
    parts = [
        f"<figure><h3>{html.escape(chart['title'])}</h3>"
        f'<div class="plot" id="chart-{number}" role="img"'
        f' aria-label="{html.escape(chart["title"])}"></div>'
        f"<figcaption>{html.escape(chart['note'])}</figcaption></figure>"
        for number, chart in enumerate(made)
    ]
    return f'<div class="charts">{"".join(parts)}</div>'


def samples(report: Report) -> str:
    """A row of columns for each prompt: every model's words side by side."""
    columns = [(name, score.samples) for name, score in report.scores.items()]
    rows = []
    for number in range(max((len(found) for _, found in columns), default=0)):
        cells = "".join(
            f'<div><p class="note">{html.escape(name)}</p>'
            f'<pre><span class="prompt">{html.escape(found[number][0])}</span>'
            f"{html.escape(found[number][1].rstrip())}</pre></div>"
            for name, found in columns
        )
        rows.append(f'<h3>Sample {number + 1}</h3><div class="samples">{cells}</div>')
    return "".join(rows)


def settings(report: Report) -> str:
    parts = []
    for record in report.records:
        facts = {key: value for key, value in record.state.items() if isinstance(value, str | int)}
        lines = "\n".join(f"{key} = {value}" for key, value in facts.items())
        text = f"# config.toml\n{record.text}\n# the last checkpoint\n{lines}"
        parts.append(
            f"<details><summary>{html.escape(record.name)}</summary>"
            f"<pre>{html.escape(text)}</pre></details>"
        )
    return "".join(parts)

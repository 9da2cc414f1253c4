"""The report in a real browser, where Chromium and playwright are there (extra dev; Debian:
chromium).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastlm.report.page import Report, page
from fastlm.report.runs import RunRecord
from fastlm.report.scores import Scores

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page with every chart, of three runs with long names."""
    generator = np.random.default_rng(0)
    stages: dict[str, dict[str, Any]] = {
        "a-pretrained-model": {"data": "text", "shortlist": 3072},
        "a-model-that-answers": {"max_len": 256},
        "a-model-that-prefers": {"max_len": 256, "beta": 0.1},
    }
    records = []
    scores = {}
    for name, settings in stages.items():
        steps = [
            {
                "step": n,
                "loss": 4 / n**0.3,
                "tokens": 1024 * n,
                "seconds": 0.5,
                "tokens_per_s": 2048.0,
                "peak_gib": 1.5,
                "lr": 1e-3 / n,
                "grad_norm": 1.0,
                "watts": 300.0,
                "rewards/accuracies": 0.5,
                "rewards/margins": 0.1 * n,
            }
            for n in range(1, 60)
        ]
        held_out = [{"step": n, "validation_loss": 4 / (1 + n) ** 0.25} for n in (0, 30, 59)]
        records.append(RunRecord(name, Path(name), steps, held_out, {}, settings, "steps = 60\n"))
        nats = generator.exponential(3, 500)
        counts = generator.integers(1, 200, 500)
        samples = [("def main(", "x" * 300), ("# " + "words " * 40, "and more")]
        scores[name] = Scores(nats, np.arange(1, 501), counts, 512, samples)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(Report(records, [], {}, scores, "text", "", "cpu")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


OVERLAPS = """() => {
  const found = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const frame = plot.getBoundingClientRect();
    const kinds = ".legend, .xtitle, .ytitle, .xaxislayer-above, .yaxislayer-above";
    const texts = [...plot.querySelectorAll(kinds)]
      .map((e) => [e.getAttribute("class"), e.getBoundingClientRect()])
      .filter(([, r]) => r.width > 0);
    for (const [name, r] of texts)
      if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.bottom > frame.bottom + 1)
        found.push(plot.id + ": " + name + " leaves its chart");
    texts.forEach(([a, r], i) => texts.slice(i + 1).forEach(([b, s]) => {
      if (r.left < s.right - 1 && s.left < r.right - 1
          && r.top < s.bottom - 1 && s.top < r.bottom - 1)
        found.push(plot.id + ": " + a + " lies over " + b);
    }));
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_overlaps_leaves_its_place_or_asks_the_network(report, browser, screen, scheme):
    width, height = SCREENS[screen]
    viewport = {"width": width, "height": height}
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    tab = context.new_page()
    said: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(report.as_uri())
    assert tab.locator(".plot .main-svg").count() > 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(OVERLAPS) == []
    titles = tab.locator(".xtitle, .ytitle").all_text_contents()
    assert len(titles) == 2 * tab.locator(".plot").count()
    assert all(titles)
    assert said == []
    assert requests == [report.as_uri()]
    context.close()


def test_the_axis_is_chosen_with_the_keyboard(report, browser):
    tab = browser.new_page()
    tab.goto(report.as_uri())
    tab.focus("input[name=axis]:checked")
    assert "tokens trained" in tab.locator(".xtitle").all_text_contents()
    tab.keyboard.press("ArrowRight")
    assert "hours of training steps" in tab.locator(".xtitle").all_text_contents()
    tab.keyboard.press("ArrowRight")
    assert "steps" in tab.locator(".xtitle").all_text_contents()
    tab.close()


def contrast(a: str, b: str) -> float:
    """The contrast of two colours "rgb(r, g, b)" (WCAG 2.2, relative luminance)."""

    def luminance(colour: str) -> float:
        values = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted([luminance(a), luminance(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_curves_can_be_told_from_the_paper(report, browser, scheme):
    context = browser.new_context(color_scheme=scheme)
    tab = context.new_page()
    tab.goto(report.as_uri())
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    panel = tab.evaluate("getComputedStyle(document.querySelector('pre')).backgroundColor")
    for selector, behind in {
        "body": paper,
        "nav a": paper,
        "p.note": paper,
        "th": paper,
        "figcaption": paper,
        "pre .prompt": panel,
    }.items():
        ink = tab.evaluate(f"getComputedStyle(document.querySelector('{selector}')).color")
        assert contrast(ink, behind) >= 4.5, selector
    for line in tab.locator(".plot .js-line").all()[:12]:
        colour = line.evaluate("e => getComputedStyle(e).stroke")
        assert contrast(colour, paper) >= 3, colour
    context.close()

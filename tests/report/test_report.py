"""fastlm report and fastlm watch: what the page says is what the runs logged and the models do."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs

from fastlm.cli import main
from fastlm.data.catalogue import open_source
from fastlm.data.text.documents import read_documents
from fastlm.errors import UserError
from fastlm.evaluation.protocols import make
from fastlm.evaluation.score import segment_nats
from fastlm.interop.open_model import open_model
from fastlm.report import scores
from fastlm.report.charts import POINTS, curve
from fastlm.report.page import Report, in_script, markdown, page
from fastlm.report.runs import RunRecord, read_runs
from fastlm.report.watch import Handler

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_text, small_tokenizer) -> Path:
    """A run of a tiny model, of six steps."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    options = ["--preset", "tiny", "--model.vocab-size", "384", "--tokenizer", str(small_tokenizer)]
    options += ["--data", str(small_text), "--cache", str(folder.parent / "cache")]
    options += ["--batch-rows", "4", "--seq-len", "32", "--steps", "6", "--validate-every", "3"]
    assert main(["pretrain", *options, "--device", "cpu", "--out", str(folder)]) == 0
    return folder


def record(steps: list[dict], name: str = "run", **settings) -> RunRecord:
    validations = [{"step": 0, "validation_loss": 4.0, "validation_perplexity": 54.6}]
    return RunRecord(name, Path(name), steps, validations, {}, settings, "")


def step(number: int, loss: float) -> dict:
    return {"step": number, "loss": loss, "tokens": 10 * number, "seconds": 36.0}


def data_of(text: str) -> dict:
    """The values that the page's script draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def test_the_page_has_every_step_and_validation_of_the_metrics(run, tmp_path):
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out), "--no-scores"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    charts = {chart["title"]: chart for chart in data_of(out.read_text())["charts"]}
    training, held_out = charts["Pretraining: loss"]["curves"]
    assert training["y"] == [row["loss"] for row in rows if "loss" in row]
    assert training["tokens"] == [row["tokens"] for row in rows if "loss" in row]
    assert held_out["y"] == [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert held_out["step"] == [0, 3, 6]
    total = sum(row["seconds"] for row in rows if "loss" in row) / 3600
    assert training["hours"][-1] == pytest.approx(total)


def test_a_models_perplexity_is_that_of_fastlm_eval_on_the_same_text(run, small_text):
    text = small_text.read_text(encoding="utf-8")[:6000]
    found = scores.score(run, text, {}, CPU, lambda words: None)
    model, tokenizer = open_model(str(run), CPU)
    ids = tokenizer.encode(text)[: scores.SCORED_TOKENS]
    protocol = make("window", [tokenizer.decode(ids)], tokenizer, model.config.max_seq_len)
    nats = segment_nats(model, protocol.segments, CPU)
    assert found.nats.sum() == pytest.approx(nats.sum(), rel=1e-6)
    assert len(found.nats) == sum(segment.n_scored for segment in protocol.segments)
    assert found.position.max() == found.window - 1
    assert found.samples[0][0] == tokenizer.decode(ids[:24])


def test_the_held_out_text_is_the_validation_split_where_there_is_one(tmp_path):
    for name, words in {"train": "alpha ", "validation": "omega "}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.txt").write_text(words * 50)
    assert set(scores.held_out_text(str(tmp_path)).split()) == {"omega"}
    source = open_source(str(tmp_path))
    assert scores.held_out_text(str(tmp_path)) == "".join(read_documents(source, "validation"))


def test_means_by_doubling_are_those_of_a_loop():
    generator = np.random.default_rng(0)
    values = generator.integers(1, 300, 2000)
    nats = generator.normal(size=2000)
    seen = 0
    for first, last, mean, count in scores.by_doubling(values, nats):
        inside = [n for v, n in zip(values, nats, strict=True) if first <= v <= last]
        assert mean == pytest.approx(np.mean(inside))
        assert count == len(inside)
        seen += count
    assert seen == 2000


def test_a_long_curve_is_averaged_and_keeps_its_mean():
    steps = [step(n, float(n % 7)) for n in range(1, 4 * POINTS + 1)]
    (line,) = curve(record(steps), steps, "loss", "run")
    assert len(line["y"]) == POINTS
    assert np.mean(line["y"]) == pytest.approx(np.mean([row["loss"] for row in steps]))
    assert line["step"][-1] == 4 * POINTS
    assert line["hours"][-1] == pytest.approx(4 * POINTS * 0.01)


def test_nothing_that_a_run_says_can_end_a_script_or_become_a_tag():
    hostile = "</script><img src=x onerror=alert(1)>"
    found = record([step(1, 2.0)], name=hostile, data=hostile)
    made = page(Report([found], [], {}, {}, hostile, hostile, hostile), "/plotly.js")
    assert hostile not in made
    assert "<img" not in made
    assert data_of(made)["runs"] == [hostile]
    assert json.loads(in_script({"a": hostile})) == {"a": hostile}


def test_the_page_asks_for_nothing_from_elsewhere(run):
    records, table, settings = read_runs((str(run),))
    made = page(Report(records, table, settings, {}, "", "", ""))
    assert get_plotlyjs() in made
    own = made.replace(get_plotlyjs(), "")
    assert not re.findall(r'(?:src|href)="(?!#|data:)', own)


def test_a_fence_in_a_sample_does_not_end_the_markdown_block(run):
    records, table, settings = read_runs((str(run),))
    sample = [("a prompt\n```\n", "text")]
    found = scores.Scores(np.ones(2), np.ones(2), np.ones(2), 32, sample)
    made = markdown(Report(records, table, settings, {"first": found}, "text", "", "cpu"))
    assert "\n````\na prompt\n```\ntext\n````" in made
    assert "| perplexity of the scored text | 2.72 |" in made


def test_two_runs_of_one_name_are_told_apart_and_laid_over_one_another(run, tmp_path):
    for place in ("a/run", "b/run"):
        (tmp_path / place).mkdir(parents=True)
        for name in ("metrics.jsonl", "config.toml"):
            (tmp_path / place / name).write_text((run / name).read_text())
    records, _, _ = read_runs((str(tmp_path / "a/run"), str(tmp_path / "b/run")))
    assert [record.name for record in records] == ["a/run", "b/run"]
    made = page(Report(records, [], {}, {}, "", "", ""), "/plotly.js")
    (speed,) = (chart for chart in data_of(made)["charts"] if chart["title"] == "Speed")
    assert [line["run"] for line in speed["curves"]] == ["a/run", "b/run"]


def test_damaged_lines_and_a_missing_checkpoint_do_not_hide_the_rest(run, tmp_path):
    lines = (run / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo\n[]\n' + lines)
    (tmp_path / "config.toml").write_text((run / "config.toml").read_text())
    ((found,), _, _) = read_runs((str(tmp_path),))
    assert len(found.steps) == 6
    assert found.parameters is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "report needs RUNS"),
        (["nowhere"], "nowhere does not exist; give the folder of a run or of a pipeline"),
        (["{empty}"], "holds no metrics.jsonl"),
        (["{run}", "{run}"], "a run is named twice"),
        (["{run}", "--out", "page.txt"], "--out is page.txt, expected a name that ends with .html"),
        (["{run}", "--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_each_mistake_is_one_line(arguments, words, run, tmp_path, mistake):
    arguments = [word.format(run=run, empty=tmp_path) for word in arguments]
    assert words in mistake(["report", *arguments])


def test_a_pipelines_damaged_table_is_one_line(run, tmp_path, mistake):
    (tmp_path / "pretrain").mkdir()
    for name in ("metrics.jsonl", "config.toml"):
        (tmp_path / "pretrain" / name).write_text((run / name).read_text())
        (tmp_path / name).write_text((run / name).read_text())
    for damaged in ("{", "{}", '[{"model": 1}]'):
        (tmp_path / "results.json").write_text(damaged)
        assert "is not a pipeline's table" in mistake(["report", str(tmp_path), "--no-scores"])


@pytest.fixture
def address(run):
    handler = partial(Handler, (str(run),), "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def get(address: str, path: str, host: str = "") -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}")
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_the_watched_page_follows_the_metrics(run, address):
    log = run / "metrics.jsonl"
    before = log.read_text()
    code, text = get(address, "/")
    assert code == 200
    assert data_of(text)["live"]
    try:
        line = json.loads(before.splitlines()[-2]) | {"step": 7, "loss": 1.25}
        log.write_text(before + json.dumps(line) + "\n")
        later = data_of(get(address, "/")[1])["charts"][0]["curves"][0]
        assert (later["step"][-1], later["y"][-1]) == (7, 1.25)
    finally:
        log.write_text(before)


def test_nothing_but_the_page_and_its_library_is_served(address):
    assert "Plotly" in get(address, "/plotly.js")[1]
    for path in ("/metrics.jsonl", "/../config.toml", "//etc/passwd", "/%2e%2e/config.toml", "/?x"):
        assert get(address, path)[0] == 404, path
    assert get(address, "/", host="elsewhere.example:80")[0] == 403


def test_watching_says_at_once_what_is_wrong(run, mistake):
    assert "does not exist" in mistake(["watch", "nowhere"])
    assert "port is 70000" in mistake(["watch", str(run), "--port", "70000"])
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as taken:
        line = mistake(["watch", str(run), "--port", str(taken.server_port)])
    assert "choose another --port" in line


def test_a_run_that_has_not_logged_yet_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        read_runs((str(tmp_path),))

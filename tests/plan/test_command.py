"""The command: its tables, its JSON, its chart, its mistakes, and the page that shows them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from fastlm.cli import main
from fastlm.config import PlanConfig
from fastlm.plan import command
from fastlm.plan.cards import CARDS, card

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


def output(capsys, *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_json_has_a_case_for_each_number_of_gpus_and_mode(capsys):
    found = json.loads(output(capsys, "--gpus", "1,8,64", "--json"))
    assert found["projected"] is True
    where = [
        (case["way"]["mode"], case["way"]["shards"] * case["way"]["copies"])
        for case in found["cases"]
    ]
    assert where == [("one", 1), ("ddp", 8), ("fsdp", 8), ("ddp", 64), ("fsdp", 64), ("hsdp", 64)]


def test_tables_have_the_figures_of_the_json(capsys):
    words = ("modern-124m", "--gpus", "8", "--gpu", "h200")
    text = output(capsys, *words)
    cases = json.loads(output(capsys, *words, "--json"))["cases"]
    for case in cases:
        line = next(
            line for line in text.splitlines() if line.split()[:2] == ["8", case["way"]["mode"]]
        )
        assert f"{sum(case['memory'].values()) / 2**30:.2f}" in line.split()
        assert f"{case['run']['mfu']:.1%}" in text


def test_tables_fit_eighty_columns():
    cfg = PlanConfig(model="modern-124m")
    cases = command.cases_of(cfg, command.pretraining(cfg.model), card("h100"))
    console = Console(width=200)
    for table in (
        command.memory_table(cases, card("h100")),
        command.step_table(cases),
        command.run_table(cases, cfg),
    ):
        assert console.measure(table).maximum <= 80


def test_chart_is_svg_with_a_curve_for_each_mode(capsys, tmp_path):
    output(capsys, "--gpus", "1,8,64", "--chart", str(tmp_path / "plan.svg"))
    words = ET.parse(tmp_path / "plan.svg").getroot().itertext()
    assert {"ddp", "fsdp", "hsdp", "GPUs"} <= {word.strip() for word in words}


def test_the_page_shows_what_the_command_prints_and_draws(capsys, tmp_path, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "large.toml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"```\n\$ fastlm plan ([^\n]*)\n(.*?)```", text, flags=re.DOTALL)
    assert len(shown) == 3
    for words, printed in shown:
        lines = output(capsys, *words.split()).splitlines()
        assert "\n".join(line.rstrip() for line in lines) + "\n" == printed
    (words,) = re.findall(r"`fastlm plan (.*) --chart docs/scaling.svg`", text)
    output(capsys, *words.split(), "--chart", "new.svg")
    assert (tmp_path / "new.svg").read_bytes() == PAGE.with_suffix(".svg").read_bytes()


def test_a_recipe_of_ones_own_is_planned(capsys, tmp_path):
    path = tmp_path / "large.toml"
    path.write_text(
        'preset = "modern-124m"\nbatch_rows = 8\nmicro_batch_rows = 2\nseq_len = 512\n'
        "[model]\nn_layers = 3\n"
    )
    (case,) = json.loads(output(capsys, str(path), "--gpus", "1", "--json"))["cases"]
    assert (case["work"]["passes"], case["work"]["rows"], case["work"]["seq_len"]) == (4, 2, 512)
    assert case["work"]["config"]["n_layers"] == 3


def test_rows_are_shared_out(capsys):
    words = (
        "--gpus",
        "64",
        "--batch-rows",
        "512",
        "--micro-batch-rows",
        "4",
        "--checkpoint-activations",
        "--json",
    )
    work = json.loads(output(capsys, *words))["cases"][0]["work"]
    assert (work["rows"], work["passes"], work["recompute"]) == (4, 2, True)


def test_what_does_not_fit_is_said(capsys):
    text = output(capsys, "--gpus", "1", "--micro-batch-rows", "256", "--batch-rows", "256")
    assert "too full" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.5, "500 ms"), (1.5, "1.50 s"), (150, "2.50 min"), (9e3, "2.50 h"), (2e5, "2.31 days")],
)
def test_times_have_three_figures(seconds, words):
    assert command.time(seconds) == words


MISTAKES = [
    ("modern-253", "did you mean modern-253m? (or give the path of a .toml"),
    ("no/such.toml", "could not read no/such.toml: No such file or directory; give a .toml file"),
    ("--gpu h10", f"unknown GPU 'h10'; choose among {', '.join(CARDS)}"),
    ("--gpu=", f"unknown GPU ''; choose among {', '.join(CARDS)}"),
    ("--gpus 0", "gpus is '0'; it must be positive integers below"),
    ("--gpus=-8", "gpus is '-8'; it must be positive integers below"),
    ("--gpus 1,,8", "gpus is '1,,8'; it must be positive integers below"),
    ("--gpus 1.5", "gpus is '1.5'; it must be positive integers below"),
    (f"--gpus {10**9}", "it must be positive integers below 1,000,000,000, separated by commas"),
    ("--gpus ²", "gpus is '²'; it must be positive integers below"),
    ("--gpus-per-node 0", "gpus_per_node is 0; it must be a positive integer"),
    ("--tokens 0", "tokens is 0.0; it must be positive"),
    ("--tokens nan", "--tokens is nan; it must be finite"),
    ("--tokens many", "--tokens is 'many'; it must be a number"),
    ("--write-gb-s 0", "write_gb_s is 0.0; it must be positive"),
    ("--batch-rows -1", "batch_rows is -1; it must not be negative"),
    ("--batch-rows 12 --gpus 8", "batch_rows is 12, not a multiple of 8 GPUs"),
    ("--micro-batch-rows 3 --gpus 1", "which does not divide the 32 rows of a GPU"),
    ("--chart plan.png", "chart is 'plan.png'; it must end with .svg"),
    ("--gpus 1 --micro-batch-rows 256 --batch-rows 256 --chart new.svg", "the model fits no GPU"),
    ("--gpus 1 --chart {file}/plan.svg", "could not write"),
    ("modern-253m modern-124m", "the model is 'modern-253m' already"),
    ("--gpusx 1", "unknown option --gpusx; did you mean --gpus?"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert main(["plan", *words.replace("{file}", str(tmp_path / "file")).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastlm: ")
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

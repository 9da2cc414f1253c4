"""`fastlm pipeline`: pretrain, SFT, DPO, and one table of what each did.

The same command again goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastlm import checkpoint, files
from fastlm.config import DpoConfig, PipelineConfig, PretrainConfig, SftConfig
from fastlm.config.toml import is_same, load_run, to_toml
from fastlm.data.examples.load import load_instructions, load_preferences, pack_examples
from fastlm.data.examples.packing import PackedBatch, PackedRows, packed_epoch
from fastlm.data.prefetch import move
from fastlm.errors import check
from fastlm.evaluation import protocols
from fastlm.evaluation.evaluate import open_scorer, read_documents, views
from fastlm.evaluation.score import perplexity, segment_nats, summarise
from fastlm.model import Transformer, count_parameters
from fastlm.monitor import wide_console
from fastlm.report.command import write_report
from fastlm.report.page import number
from fastlm.runtime import autocast, pick_device, tf32_matmuls
from fastlm.tokenizer import Tokenizer
from fastlm.train import loop, parallel
from fastlm.train.dpo import dpo
from fastlm.train.losses import membership, sum_per_answer
from fastlm.train.packed import read_examples, with_lengths
from fastlm.train.pretrain import pretrain
from fastlm.train.sft import sft

Row = dict[str, Any]


def pipeline(cfg: PipelineConfig) -> int:
    """Run the stages that are not done yet, score every model, print the table.

    Returns 0, or the exit code of a stage that was stopped.
    """
    check(
        not parallel.launched(),
        "the pipeline is one process; run pretrain, sft and dpo under torchrun, one by one",
    )
    with tf32_matmuls(cfg.eval.tf32, pick_device(cfg.eval.device)):
        pass  # says so now if the device has no TF32
    out = claim_folder(cfg)
    pretrained = str(out / "pretrain")
    tuned = str(out / "sft")
    aligned = str(out / "dpo")
    code = (
        run_stage(pretrain, cfg.pretrain, out / "pretrain")
        or run_stage(sft, dataclasses.replace(cfg.sft, model=pretrained), out / "sft")
        or run_stage(dpo, dataclasses.replace(cfg.dpo, model=tuned), out / "dpo")
    )
    if code:
        command = f"fastlm pipeline {cfg.recipe} --out {out}"
        print(f"The pipeline goes on with the same command: {command}")
        return code
    models = {"baseline": cfg.baseline} if cfg.baseline else {}
    models |= {"pretrained": pretrained, "+ SFT": tuned, "+ DPO": aligned}
    console = wide_console()
    console.rule("[bold]evaluation")
    rows = []
    for name, path in models.items():
        print(f"scoring {path}")
        rows.append({"model": name} | score(cfg, path, console))
    files.write_json(out / "results.json", rows)
    print_table(console, cfg, rows)
    page = out / "report.html"
    write_report((str(out),), page, "", True, pick_device(cfg.eval.device), console)
    print(f"Curves and samples: {page}")
    return 0


def claim_folder(cfg: PipelineConfig) -> Path:
    """The pipeline's folder, with its options in config.toml; UserError where it holds others."""
    out = Path(cfg.out or f"runs/pipeline-{cfg.recipe}")
    options = out / "config.toml"
    if options.is_file():
        check(
            is_same(cfg, options.read_text(encoding="utf-8")),
            f"{out} was begun with other options; give the same ones to go on, or choose another "
            "--out",
        )
        return out
    empty = not out.exists() or not any(out.iterdir())
    check(empty, f"{out} is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    files.write_text(options, to_toml(cfg))
    return out


def run_stage(
    stage: Callable[[Any], int], cfg: PretrainConfig | SftConfig | DpoConfig, folder: Path
) -> int:
    """Start a stage, go on with it, or leave it where it is done. Returns its exit code."""
    Console().rule(f"[bold]{folder.name}")
    saved = checkpoint.steps_saved(folder / "checkpoints")
    if not saved:  # stopped before its first checkpoint, or not begun
        shutil.rmtree(folder, ignore_errors=True)
        return stage(dataclasses.replace(cfg, out=str(folder)))
    begun = load_run(type(cfg), str(folder))
    place, state, _ = checkpoint.newest_whole(folder)
    if state["step"] >= begun.steps:
        print(f"done: {place}")
        return 0
    return stage(dataclasses.replace(begun, resume=str(folder)))


def score(cfg: PipelineConfig, path: str, console: Console) -> Row:
    """What one model is worth on the held-out text.

    Where it is one of ours, also on held-out answers and preferences.
    """
    device = pick_device(cfg.eval.device)
    model, tokenizer, longest = open_scorer(path, device, "")
    o = cfg.eval
    documents, digest, _ = read_documents(o.data, o.split, o.max_documents, o.bad_rows)
    wanted = protocols.chosen(cfg.eval.protocols)
    scores = {}
    for protocol in views(wanted, documents, tokenizer, longest, console):
        with tf32_matmuls(cfg.eval.tf32, device):
            nats = segment_nats(model, protocol.segments, device, cfg.eval.batch_tokens)
        scores[protocol.name] = dataclasses.asdict(summarise(protocol, nats))
    row: Row = {
        "place": path,
        "text": cfg.eval.data,
        "text_sha256": digest,
        "perplexity": scores,
        "parameters": None,
        "answer_perplexity": None,
        "prefers_chosen": None,
    }
    if isinstance(model, Transformer):
        row["parameters"] = count_parameters(model.config)
        row["answer_perplexity"] = answer_perplexity(cfg.sft, model, tokenizer, device)
        row["prefers_chosen"] = prefers_chosen(cfg.dpo, model, tokenizer, device)
    return row


@torch.no_grad()
def answer_perplexity(
    cfg: SftConfig, model: Transformer, tokenizer: Tokenizer, device: torch.device
) -> float | None:
    """exp of the mean -log p of held-out answers' tokens, their end-of-text included.

    None where none are held out.
    """
    rows = held_out(load_instructions, cfg, model, tokenizer)
    if rows is None:
        return None

    def loss(batch: PackedBatch) -> dict[str, torch.Tensor]:
        with autocast(device):
            return {"loss": model.loss(batch.x, batch.y, **batch.layout())}

    batches = (((b,), b.counted) for b in packed_epoch(rows, 4))
    return perplexity(loop.validate(loss, batches, device)["loss"])


@torch.no_grad()
def prefers_chosen(
    cfg: DpoConfig, model: Transformer, tokenizer: Tokenizer, device: torch.device
) -> float | None:
    """Share of held-out pairs whose chosen answer has the higher log p per token.

    None where none are held out.
    """
    rows = held_out(load_preferences, cfg, model, tokenizer, group=2)
    if rows is None:
        return None
    right = pairs = 0
    for batch in (move(b, device) for b in packed_epoch(rows, 1)):
        with autocast(device):
            logps = model.logprobs(batch.x, batch.y, **batch.layout())
        member = membership(batch.unit, batch.units)
        means = sum_per_answer(logps.flatten(), member) / member.sum(1).view(-1, 2)
        right += int((means[:, 0] > means[:, 1]).sum())
        pairs += len(means)
    return right / pairs


def held_out(
    load: Callable[..., Any],
    cfg: SftConfig | DpoConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    group: int = 1,
) -> PackedRows | None:
    """The stage's own held-out rows, as long as the model can read."""
    cfg = with_lengths(cfg, model.config.max_seq_len, group)
    examples = read_examples(cfg, tokenizer, load)
    return pack_examples(examples, cfg.row_len, group, share=group > 1)[1]


def print_table(console: Console, cfg: PipelineConfig, rows: list[Row]) -> None:
    """Each protocol's perplexity, against the first row's, and what the tuning stages are for."""
    first = rows[0]
    names = list(first["perplexity"])
    table = Table("model", box=None)
    table.add_column("parameters", justify="right")
    for name in names:
        table.add_column(f"perplexity ({name})", justify="right")
    for title in (f"vs {first['model']}", "held-out answers", "prefers chosen"):
        table.add_column(title, justify="right")
    for row in rows:
        scores = [row["perplexity"].get(name, {}).get("perplexity") for name in names]
        change = scores[0] / first["perplexity"][names[0]]["perplexity"] - 1
        table.add_row(
            row["model"],
            number(row["parameters"], ",d"),
            *[number(value, ".2f") for value in scores],
            number(None if row is first else change, "+.0%"),
            number(row["answer_perplexity"], ".2f"),
            number(row["prefers_chosen"], ".1%"),
        )
    console.print(table)
    console.print(
        f"perplexity: of {cfg.eval.data} (SHA-256 {first['text_sha256']}); "
        f"held-out answers: perplexity of {cfg.sft.data};\n"
        f"prefers chosen: pairs of {cfg.dpo.data} whose chosen answer has the higher "
        f"log-probability per token",
        highlight=False,
        soft_wrap=True,
    )

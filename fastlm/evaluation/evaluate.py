"""`fastlm eval`: several models on one text, every protocol, one table."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastlm.checkpoint import locate
from fastlm.config import EvalConfig
from fastlm.data.catalogue import open_source
from fastlm.data.text.documents import read_documents as documents_of
from fastlm.errors import UserError, check
from fastlm.evaluation import protocols
from fastlm.evaluation.protocols import Protocol
from fastlm.evaluation.score import Logps, Result, segment_nats, summarise
from fastlm.evaluation.transformers_model import open_transformers_model
from fastlm.interop.config_json import ARCHITECTURES, is_hugging_face, read_architecture
from fastlm.interop.open_model import local_folder, matching_tokenizer, open_model
from fastlm.model import Transformer
from fastlm.monitor import wide_console
from fastlm.runtime import launched, pick_device, tf32_matmuls
from fastlm.tokenizer import Tokenizer


def evaluate(cfg: EvalConfig) -> int:
    """Score every model by every protocol; print a table, or JSON."""
    device = pick_device(cfg.device)
    wanted = protocols.chosen(cfg.protocols)
    with process_group(device) as is_main_process, tf32_matmuls(cfg.tf32, device):
        console = wide_console(stderr=cfg.json)
        console.quiet = not is_main_process
        names = cfg.models.split(",")
        for name in names:
            check_there(name)
        say(console, f"reading {cfg.data}")
        documents, digest, left_out = read_documents(
            cfg.data, cfg.split, cfg.max_documents, cfg.bad_rows
        )
        if left_out:
            say(console, f"{left_out:,} records without a text left out")
        results: list[tuple[str, Result]] = []
        for name in names:
            say(console, f"loading {name}")
            model, tokenizer, longest = open_scorer(name, device, cfg.tokenizer)
            for protocol in views(wanted, documents, tokenizer, longest, console):
                result = score_protocol(model, protocol, name, cfg, device, console)
                results.append((name, result))
                say(console, f"{name}, {result.protocol}: perplexity {result.perplexity:,.2f}")
        if not cfg.json:
            print_table(console, cfg, digest, results)
        elif is_main_process:
            print_json(cfg, digest, results)
    return 0


def score_protocol(
    model: Transformer | Logps,
    protocol: Protocol,
    name: str,
    cfg: EvalConfig,
    device: torch.device,
    console: Console,
) -> Result:
    """What the model of that name reaches by one protocol, with a progress bar in a terminal."""
    hidden = not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        total = sum(segment.n_scored for segment in protocol.segments)
        task = progress.add_task(f"{name}  {protocol.name}", total=total)
        nats = segment_nats(
            model,
            protocol.segments,
            device,
            cfg.batch_tokens,
            partial(progress.advance, task),
            cfg.compile,
        )
    return summarise(protocol, nats)


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def check_there(name: str) -> None:
    """Raise UserError where there is no model of that name: before the first one is scored."""
    folder = local_folder(name)
    if not is_hugging_face(folder):
        locate(folder)


@contextmanager
def process_group(device: torch.device) -> Iterator[bool]:
    """Under torchrun, the group of its processes while the context lasts, each with its GPU.

    Yields whether this is the main process.
    """
    if not launched():
        yield True
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(dist.get_node_local_rank())
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def read_documents(
    data: str, split: str, max_documents: int, bad_rows: str = "fail"
) -> tuple[list[str], str, int]:
    """The documents of a split, whole, their digest, and how many bad records were left out."""
    source = open_source(data, on_bad_row=bad_rows)
    splits = source.splits
    check(
        split in ("", *splits), f"{data} has no split {split!r}; choose among {', '.join(splits)}"
    )
    chosen = split or next(name for name in ("validation", "test", "train") if name in splits)
    documents = list(itertools.islice(documents_of(source, chosen), max_documents or None))
    check(bool(documents), f"{data} has no text in its split {chosen}; name another --split")
    if len(documents) == 1:
        documents = protocols.wikitext_documents(documents[0])[: max_documents or None]
    digest = hashlib.sha256("".join(documents).encode()).hexdigest()[:16]
    return documents, digest, source.bad.count


def open_scorer(
    name: str, device: torch.device, tokenizer: str
) -> tuple[Transformer | Logps, Tokenizer, int]:
    """What scores with the model of that name, its tokenizer, and its longest text in tokens."""
    folder = local_folder(name)
    if is_hugging_face(folder):
        architecture = read_architecture(folder)
        if architecture not in ARCHITECTURES:
            logps, longest, vocab_size = open_transformers_model(folder, architecture, device)
            loaded = matching_tokenizer(tokenizer or str(folder), name, vocab_size)
            return logps, loaded, longest
    model, loaded = open_model(name, device, tokenizer)
    return model, loaded, model.config.max_seq_len


def views(
    wanted: list[str],
    documents: list[str],
    tokenizer: Tokenizer,
    longest: int,
    console: Console,
) -> Iterator[Protocol]:
    """The text as each protocol sees it, the next tokenised in a thread while one is scored.

    Of all protocols (none named), those that apply, and a line for each that does not.
    """
    reasons: list[UserError] = []
    names = wanted or protocols.NAMES
    with ThreadPoolExecutor(1) as thread:
        jobs = [
            thread.submit(protocols.make, name, documents, tokenizer, longest) for name in names
        ]
        for job in jobs:
            try:
                protocol = job.result()
            except UserError as e:
                if wanted:
                    raise
                reasons.append(e)
            else:
                yield protocol
    if len(reasons) == len(names):
        raise reasons[0]
    for reason in reasons:
        console.print(f"left out: {reason}", highlight=False, markup=False, soft_wrap=True)


def print_json(cfg: EvalConfig, digest: str, results: list[tuple[str, Result]]) -> None:
    rows = [{"model": name, **dataclasses.asdict(result)} for name, result in results]
    found = {"data": cfg.data, "text_sha256": digest, "tf32": cfg.tf32, "results": rows}
    print(json.dumps(found, indent=1))


def print_table(
    console: Console, cfg: EvalConfig, digest: str, results: list[tuple[str, Result]]
) -> None:
    matmuls = ", matmuls in TF32" if cfg.tf32 else ""
    line = f"{cfg.data}, text SHA-256 {digest}{matmuls}"
    console.print(line, highlight=False, soft_wrap=True)
    table = Table("model", "protocol", box=None)
    for name in ("perplexity", "95% interval", "nats", "tokens", "per word", "per byte"):
        table.add_column(name, justify="right")
    table.add_column("bits/byte", justify="right")
    table.add_column("how")
    for name, r in results:
        table.add_row(
            name,
            r.protocol,
            f"{r.perplexity:.2f}",
            f"{r.low:.2f} to {r.high:.2f}",
            f"{r.nats:,.1f}",
            f"{r.tokens:,}",
            f"{r.word_perplexity:,.2f}",
            f"{r.byte_perplexity:.3f}",
            f"{r.bits_per_byte:.4f}",
            r.how,
        )
    console.print(table)

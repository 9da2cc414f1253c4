"""fastlm eval: several models on one text, every protocol, one table."""

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


def read_documents(data: str, split: str, max_documents: int) -> tuple[list[str], str]:
    """The documents of a split, whole, and the split's digest."""
    source = open_source(data)
    check(
        split in ("", *source.splits),
        f"{data} has no split {split!r}; choose among {', '.join(source.splits)}",
    )
    chosen = split or next(name for name in ("validation", "test", "train") if name in source.splits)
    documents = list(itertools.islice(documents_of(source, chosen), max_documents or None))
    check(bool(documents), f"{data} has no text in its split {chosen}; name another --split")
    if len(documents) == 1:
        documents = protocols.wikitext_documents(documents[0])[: max_documents or None]
    return documents, hashlib.sha256("".join(documents).encode()).hexdigest()[:16]


def open_scorer(place: str, device: torch.device, tokenizer: str) -> tuple[Transformer | Logps, Tokenizer, int]:
    """What scores with the model at `place`, its tokenizer, and its longest text in tokens."""
    folder = local_folder(place)
    if is_hugging_face(folder) and (architecture := read_architecture(folder)) not in ARCHITECTURES:
        logps, longest, vocab_size = open_transformers_model(folder, architecture, device)
        return logps, matching_tokenizer(tokenizer or str(folder), place, vocab_size), longest
    model, loaded = open_model(place, device, tokenizer)
    return model, loaded, model.config.max_seq_len


def views(wanted: list[str], documents: list[str], tokenizer: Tokenizer, longest: int, console: Console) -> Iterator[Protocol]:
    """The text as each protocol sees it, those to come tokenised in a thread while this one is scored; of all protocols
    (none named) those that apply, and a line for each that does not."""
    reasons: list[UserError] = []
    names = wanted or protocols.NAMES
    with ThreadPoolExecutor(1) as thread:
        for made in [thread.submit(protocols.make, name, documents, tokenizer, longest) for name in names]:
            try:
                protocol = made.result()
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


def evaluate(cfg: EvalConfig) -> int:
    """Score every model by every protocol; print a table, or JSON."""
    device, wanted = pick_device(cfg.device), protocols.chosen(cfg.protocols)
    with joined(device) as first, tf32_matmuls(cfg.tf32, device):
        return report(cfg, device, wanted, first)


@contextmanager
def joined(device: torch.device) -> Iterator[bool]:
    """Under torchrun, one of its processes while the context lasts, with a GPU of its own. Whether this is the first."""
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


def report(cfg: EvalConfig, device: torch.device, wanted: list[str], first: bool) -> int:
    documents, digest = read_documents(cfg.data, cfg.split, cfg.max_documents)
    rows: list[tuple[str, Result]] = []
    console = wide_console(stderr=cfg.json)
    console.quiet = not first
    for place in cfg.models.split(","):
        model, tokenizer, longest = open_scorer(place, device, cfg.tokenizer)
        for protocol in views(wanted, documents, tokenizer, longest, console):
            with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
                task = progress.add_task(f"{place}  {protocol.name}", total=sum(s.n_scored for s in protocol.segments))
                advance = partial(progress.advance, task)
                nats = segment_nats(model, protocol.segments, device, cfg.batch_tokens, advance, cfg.compile)
            rows.append((place, summarise(protocol, nats)))
    if cfg.json and first:
        print(json.dumps({"data": cfg.data, "text_sha256": digest, "tf32": cfg.tf32,
                          "results": [{"model": place, **dataclasses.asdict(r)} for place, r in rows]}, indent=1))  # fmt: skip
    elif not cfg.json:
        show(console, cfg, digest, rows)
    return 0


def show(console: Console, cfg: EvalConfig, digest: str, rows: list[tuple[str, Result]]) -> None:
    matmuls = ", matmuls in TF32" if cfg.tf32 else ""
    console.print(f"{cfg.data}, text SHA-256 {digest}{matmuls}", highlight=False, soft_wrap=True)
    names = (
        "model",
        "protocol",
        "perplexity",
        "95% interval",
        "nats",
        "tokens",
        "per word",
        "per byte",
        "bits/byte",
        "how",
    )
    table = Table(*names, box=None)
    for column in table.columns[2:9]:
        column.justify = "right"
    for place, r in rows:
        table.add_row(
            place, r.protocol, f"{r.perplexity:.2f}", f"{r.low:.2f} to {r.high:.2f}", f"{r.nats:,.1f}", f"{r.tokens:,}",
            f"{r.word_perplexity:,.2f}", f"{r.byte_perplexity:.3f}", f"{r.bits_per_byte:.4f}", r.how,
        )  # fmt: skip
    console.print(table)

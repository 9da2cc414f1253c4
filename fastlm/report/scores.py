"""What the report finds out about a model itself: samples, and where in a text it is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlm.config import Sampling
from fastlm.data.catalogue import open_source
from fastlm.data.examples.load import load_instructions
from fastlm.data.examples.truncate import response_start
from fastlm.data.text.documents import read_documents
from fastlm.errors import UserError
from fastlm.evaluation.protocols import window_segments
from fastlm.evaluation.score import logps_of, padded_batch
from fastlm.inference.text import write_texts
from fastlm.interop.open_model import open_model, stop_tokens
from fastlm.tokenizer import Tokenizer

EMBEDDED = "python-stdlib"  # text that is always there
SCORED_TOKENS = 16384
WINDOW = 1024
PROMPT_TOKENS = 24
SAMPLE_TOKENS = 64
SAMPLES = 2
QUESTIONS = 2


@dataclass(frozen=True)
class Scores:
    """A model on the beginning of a held-out text.

    nats: -log p of each scored token, (n,). position: how many tokens of context it had, (n,).
    occurrences: how often the token is among those scored, (n,). samples: prompts with the model's
    continuations.
    """

    nats: np.ndarray
    position: np.ndarray
    occurrences: np.ndarray
    window: int
    samples: list[tuple[str, str]]

    @property
    def perplexity(self) -> float:
        """exp of the mean -log p."""
        return float(np.exp(self.nats.mean()))


def held_out_text(name: str) -> str:
    """The beginning of a source's validation split, else of its test split, else of its text."""
    source = open_source(name)
    split = next(split for split in ("validation", "test", "train") if split in source.splits)
    pieces = []
    for document in itertools.islice(read_documents(source, split), 1000):
        pieces.append(document)
        if sum(map(len, pieces)) > 8 * SCORED_TOKENS:  # enough, at a few characters a token
            break
    return "".join(pieces)


def questions(settings: dict[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
    """The first held-out prompts of an SFT run's data, as it was taught them.

    settings: the run's options.
    """
    longest = settings["max_len"] or WINDOW
    found = load_instructions(
        settings["data"], tokenizer, longest, settings["template"], "skip", settings["held_out"]
    )
    return [s.ids[: response_start(s)].tolist() for s in found.validation[:QUESTIONS]]


@torch.inference_mode()
def score(
    place: Path,
    text: str,
    taught: dict[str, Any],
    device: torch.device,
    say: Callable[[str], None],
) -> Scores:
    """Load the model of a run's best checkpoint, score the text in windows, and write samples.

    taught: the options of an SFT run, whose held-out prompts are answered too; or empty.
    """
    say(f"loading {place}")
    model, tokenizer = open_model(str(place), device)
    ids = tokenizer.encode(text)[:SCORED_TOKENS]
    window = min(WINDOW, model.config.max_seq_len)
    if len(ids) <= PROMPT_TOKENS:
        raise UserError(f"the text has {len(ids)} tokens, too few to score; name a longer --data")
    say(f"scoring {len(ids):,} tokens with {place}")
    logps = logps_of(model, model)
    nats = []
    position = []
    segments = window_segments(ids, window, window)
    for segment in segments:
        tokens, index, targets, _ = padded_batch([segment], 1, len(segment.ids) - 1)
        scored = logps(tokens.to(device), index.to(device), targets.to(device))
        nats.append(-scored.double().cpu().numpy())
        position.append(np.arange(segment.start, len(segment.ids)))
    scored_ids = np.concatenate([segment.ids[segment.start :] for segment in segments])
    _, inverse, counts = np.unique(scored_ids, return_inverse=True, return_counts=True)

    say(f"writing with {place}")
    starts = np.linspace(0, len(ids) - PROMPT_TOKENS, SAMPLES).astype(int)
    prompts = [ids[start : start + PROMPT_TOKENS] for start in starts]
    sampling = Sampling(temperature=0.8, top_p=0.95)
    stop = stop_tokens(str(place), tokenizer)
    prompts += questions(taught, tokenizer) if taught else []
    prompts = [prompt[-window // 2 :] for prompt in prompts]
    texts = write_texts(model, tokenizer, prompts, SAMPLE_TOKENS, sampling, stop=stop)
    samples = [(tokenizer.decode(p), t) for p, t in zip(prompts, texts, strict=True)]
    return Scores(np.concatenate(nats), np.concatenate(position), counts[inverse], window, samples)


def by_doubling(values: np.ndarray, nats: np.ndarray) -> list[tuple[int, int, float, int]]:
    """Means of nats where 1 <= value < 2, 2 <= value < 4, 4 <= value < 8, and so on.

    Returns (first value, last value, mean, count) of each range that holds any.
    """
    octave = np.floor(np.log2(values)).astype(int)
    found = []
    for k in range(int(octave.max()) + 1):
        inside = octave == k
        if inside.any():
            found.append((2**k, 2 ** (k + 1) - 1, float(nats[inside].mean()), int(inside.sum())))
    return found

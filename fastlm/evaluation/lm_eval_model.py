"""lm-eval's tasks with a fastlm model (extra lm-eval): `fastlm lm-eval MODEL --tasks ...`.

The command takes every option of lm-eval's own. lm-eval knows the models that its process
registered, so the command registers "fastlm" and hands over. From Python:

    register()
    lm_eval.simple_evaluate(model="fastlm", model_args="pretrained=DIR", tasks=[...])
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.config import LmEvalConfig, Sampling
from fastlm.errors import UserError
from fastlm.evaluation.protocols import Segment, rolling
from fastlm.evaluation.score import LOGIT_ROWS, Logps, segment_nats, segment_sums
from fastlm.inference.text import write_texts
from fastlm.interop.open_model import open_model, stop_tokens
from fastlm.model import Transformer
from fastlm.runtime import pick_device
from fastlm.tokenizer import Tokenizer

GENERATED_ROWS = {"cpu": 8, "cuda": 64}


def run_lm_eval(cfg: LmEvalConfig) -> int:
    """Run lm-eval's command line with this model; all but model_args is lm-eval's own."""
    register()
    from lm_eval.__main__ import cli_evaluate

    model = ["--model", "fastlm", "--model_args", f"pretrained={cfg.model}"]
    before = sys.argv
    sys.argv = ["lm-eval", "run", *model, *cfg.arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0


@cache
def register() -> type:
    """Make "fastlm" a model of lm-eval's in this process; returns the class."""
    try:
        # registers lm-eval's own models, which lm-eval only does where none is registered
        import lm_eval.models  # noqa: F401
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise UserError(
            "fastlm lm-eval needs lm-eval; install it: pip install 'fastlm[lm-eval]'"
        ) from None

    class FastlmModel(TemplateLM):
        """pretrained: run or Hugging Face folder; batch_size: rows that are written at a time."""

        def __init__(
            self,
            pretrained: str = "",
            tokenizer: str = "",
            device: str | None = None,
            batch_size: int | str | None = None,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            if not pretrained:
                raise UserError("which model? pass --model_args pretrained=DIR")
            self._device = pick_device(device or "auto")
            self.name = pretrained
            self.model, self.own_tokenizer = open_model(pretrained, self._device, tokenizer)
            rows = str(batch_size or "auto")
            self.rows = GENERATED_ROWS[self._device.type]
            if rows.isdigit() and int(rows) > 1:
                self.rows = int(rows)

        @property
        def eot_token_id(self) -> int:
            return self.own_tokenizer.eos_id

        @property
        def tokenizer_name(self) -> str:
            return self.own_tokenizer.hash

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **options: Any
        ) -> list[int]:
            return self.own_tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: list, **options: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return score_pairs(self.model, pairs)

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            segments: list[Segment] = []
            for n, request in enumerate(requests):
                ids = self.own_tokenizer.encode(request.args[0])
                longest = self.model.config.max_seq_len
                segments += rolling(ids, self.own_tokenizer.eos_id, longest, n)
            logps = [0.0] * len(requests)
            all_nats = segment_nats(self.model, segments, self._device)
            for segment, nats in zip(segments, all_nats, strict=True):
                logps[segment.document] -= float(nats)
            return logps

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            contexts = [request.args for request in requests]
            return continue_texts(self.model, self.own_tokenizer, self.name, contexts, self.rows)

    register_model("fastlm")(FastlmModel)
    return FastlmModel


def score_pairs(
    model: Transformer, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """log p of each continuation after its context, and whether greedy decoding writes it.

    Both are token ids. What does not fit the model's context is cut off at the left.
    """
    if not pairs:
        return []
    segments = []
    for n, (context, continuation) in enumerate(pairs):
        ids = [*context, *continuation][-model.config.max_seq_len - 1 :]
        segments.append(Segment(ids, max(1, len(ids) - len(continuation)), n))
    device = model.embedding.device
    sums = segment_sums(logps_and_misses(model), segments, device, width=(2,))
    return [(float(logp), float(misses) == 0) for logp, misses in sums]


def logps_and_misses(model: Transformer) -> Logps:
    """log p of each target, and whether the model's first choice is another token: (n, 2)."""

    def score(tokens: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        h = model(tokens).flatten(0, 1)[index]
        weight = model.head_weight[: model.config.vocab_size]
        scored = []
        for rows, ids in zip(h.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = F.linear(rows, weight).float()
            logps = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            missed = (logits.argmax(-1) != ids).float()
            scored.append(torch.stack([logps, missed], 1))
        return torch.cat(scored)

    return score


def continue_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    name: str,
    requests: Sequence[tuple[str, dict[str, Any]]],
    rows: int,
) -> list[str]:
    """The continuation of each context, ended before the first of its `until` texts.

    requests: context and options, as lm-eval gives them. name: of the model, for its stop tokens.
    rows: contexts that are written at a time.
    """
    stop = stop_tokens(name, tokenizer)
    max_len = model.config.max_seq_len
    answers = [""] * len(requests)

    def options_of(n: int) -> str:
        return repr(sorted(requests[n][1].items()))

    for _, group in groupby(sorted(range(len(requests)), key=options_of), key=options_of):
        alike = sorted(group, key=lambda n: len(requests[n][0]))
        options = requests[alike[0]][1]
        until = options.get("until") or []
        ends = [until] if isinstance(until, str) else until
        max_new = min(int(options.get("max_gen_toks", 256)), max_len - 1)
        sampling = sampling_of(options)
        for start in range(0, len(alike), rows):
            batch = alike[start : start + rows]
            prompts = []
            for n in batch:
                ids = tokenizer.encode(requests[n][0]) or [tokenizer.eos_id]
                prompts.append(ids[-(max_len - max_new) :])
            texts = write_texts(model, tokenizer, prompts, max_new, sampling, 0, stop, ends)
            for n, text in zip(batch, texts, strict=True):
                answers[n] = text
    return answers


def sampling_of(options: dict[str, Any]) -> Sampling:
    """How a request's next tokens are chosen: greedily, unless it asks for sampling."""
    if not options.get("do_sample"):
        return Sampling(temperature=0)
    return Sampling(
        temperature=float(options.get("temperature", 1)),
        top_k=int(options.get("top_k", 0)),
        top_p=float(options.get("top_p", 1)),
    )

"""lm-eval with a fastlm model (extra lm-eval): `fastlm lm-eval MODEL --tasks ...` takes every option of lm-eval's own command.

lm-eval knows the models that its process registered, so the command registers "fastlm" and hands over. From Python:
`register(); lm_eval.simple_evaluate(model="fastlm", model_args="pretrained=DIR", tasks=[...])`.
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
from fastlm.generate import write_texts
from fastlm.interop.open_model import open_model, stop_tokens
from fastlm.model import Transformer
from fastlm.runtime import pick_device
from fastlm.tokenizer import Tokenizer

GENERATED_ROWS = {"cpu": 8, "cuda": 64}


def logps_and_misses(model: Transformer) -> Logps:
    """log p of each target, and whether the model's first choice is another token: (n, 2)."""

    def score(tokens: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        h, out = model(tokens).flatten(0, 1)[index], []
        for rows, wanted in zip(h.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = F.linear(rows, model.head_weight[: model.config.vocab_size]).float()
            logps = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
            out.append(torch.stack([logps, (logits.argmax(-1) != wanted).float()], 1))
        return torch.cat(out)

    return score


def score_pairs(model: Transformer, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """(log p, whether it is what greedy decoding writes) of each continuation after its context, both token ids.

    What does not fit the model's context is cut off at the left.
    """
    if not pairs:
        return []
    segments = []
    for n, (context, continuation) in enumerate(pairs):
        ids = [*context, *continuation][-model.config.max_seq_len - 1 :]
        segments.append(Segment(ids, max(1, len(ids) - len(continuation)), n))
    sums = segment_sums(logps_and_misses(model), segments, model.embedding.device, width=(2,))
    return [(float(logp), float(misses) == 0) for logp, misses in sums]


def continue_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    place: str,
    requests: Sequence[tuple[str, dict[str, Any]]],
    rows: int,
) -> list[str]:
    """The continuation of each context, greedy or as its options say, ended before the first of its `until` texts."""
    stop, longest = stop_tokens(place, tokenizer), model.config.max_seq_len
    answers = [""] * len(requests)

    def options(n: int) -> str:
        return repr(sorted(requests[n][1].items()))

    for _, group in groupby(sorted(range(len(requests)), key=options), key=options):
        alike = sorted(group, key=lambda n: len(requests[n][0]))
        given = requests[alike[0]][1]
        until = given.get("until") or []
        ends = [until] if isinstance(until, str) else until
        room = min(int(given.get("max_gen_toks", 256)), longest - 1)
        sampling = Sampling(temperature=0)
        if given.get("do_sample"):
            sampling = Sampling(
                float(given.get("temperature", 1)),
                int(given.get("top_k", 0)),
                float(given.get("top_p", 1)),
            )
        for start in range(0, len(alike), rows):
            batch = alike[start : start + rows]
            prompts = [(tokenizer.encode(requests[n][0]) or [tokenizer.eos_id])[-(longest - room) :] for n in batch]
            texts = write_texts(model, tokenizer, prompts, room, sampling, 0, stop, ends)
            for n, text in zip(batch, texts, strict=True):
                answers[n] = text
    return answers


@cache
def register() -> type:
    """Make "fastlm" a model of lm-eval's in this process; returns the class."""
    try:
        import lm_eval.models  # noqa: F401  # registers lm-eval's own models, which it does by itself only where there are none
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise UserError("fastlm lm-eval needs lm-eval; install it: pip install 'fastlm[lm-eval]'") from None

    class FastlmModel(TemplateLM):
        """pretrained: run or Hugging Face folder; batch_size: rows that are written at a time."""

        def __init__(
            self, pretrained: str = "", tokenizer: str = "", device: str | None = None,
            batch_size: int | str | None = None, max_batch_size: int | None = None,
        ) -> None:  # fmt: skip
            super().__init__()
            if not pretrained:
                raise UserError("which model? pass --model_args pretrained=DIR")
            self._device = pick_device(device or "auto")
            self.place, (self.model, self.spoken) = (
                pretrained,
                open_model(pretrained, self._device, tokenizer),
            )
            rows = str(batch_size or "auto")
            self.rows = int(rows) if rows.isdigit() and int(rows) > 1 else GENERATED_ROWS[self._device.type]

        @property
        def eot_token_id(self) -> int:
            return self.spoken.eos_id

        @property
        def tokenizer_name(self) -> str:
            return self.spoken.hash

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            return self.spoken.encode(string)

        def _loglikelihood_tokens(self, requests: list, **options: Any) -> list[tuple[float, bool]]:
            return score_pairs(self.model, [(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            longest, totals = self.model.config.max_seq_len, [0.0] * len(requests)
            encoded = [self.spoken.encode(r.args[0]) for r in requests]
            segments = [s for n, ids in enumerate(encoded) for s in rolling(ids, self.spoken.eos_id, longest, n)]
            for s, nats in zip(segments, segment_nats(self.model, segments, self._device), strict=True):
                totals[s.document] -= float(nats)
            return totals

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return continue_texts(self.model, self.spoken, self.place, [r.args for r in requests], self.rows)

    register_model("fastlm")(FastlmModel)
    return FastlmModel


def run_lm_eval(cfg: LmEvalConfig) -> int:
    """Run lm-eval's command line with this model; all but model_args is lm-eval's own."""
    register()
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    filled_in = ["--model", "fastlm", "--model_args", f"pretrained={cfg.model}"]
    sys.argv = ["lm-eval", "run", *filled_in, *cfg.arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0

"""Any causal model that transformers knows, as something to score (extra hf): GPT-2, for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from fastlm import kernels
from fastlm.errors import UserError
from fastlm.evaluation.score import LOGIT_ROWS, Logps


def open_transformers_model(
    folder: Path, architecture: str, device: torch.device
) -> tuple[Logps, int, int]:
    """What scores with the folder's model, its longest text in tokens, and its vocabulary size.

    Raises UserError where transformers is missing or does not know the architecture, or where the
    weights do not fit it.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{folder}: architecture {architecture} needs transformers; "
            "install it: pip install 'fastlm[hf]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"transformers could not load {folder} ({architecture}): {reason}"
        ) from None
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing from its safetensors files")
    longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    return score_with(model.to(device).eval()), longest, model.config.vocab_size


def score_with(model: Any) -> Logps:
    """log p of targets, through the fused head where possible, else through the model's logits."""
    head = model.get_output_embeddings()

    def through_head(tokens: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        h = model.base_model(tokens, use_cache=False)[0].flatten(0, 1)[index]
        return kernels.linear_logprobs(h, head.weight, targets, bias=head.bias)

    def through_logits(tokens: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens, use_cache=False).logits.flatten(0, 1)
        logps = []
        for rows, ids in zip(index.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            row_logps = logits[rows].float().log_softmax(-1)
            logps.append(row_logps.gather(1, ids[:, None])[:, 0])
        return torch.cat(logps)

    return through_head if is_trunk_and_head(model, head) else through_logits


def is_trunk_and_head(model: Any, head: Any) -> bool:
    """Whether the model's logits are a linear map of its trunk's output, tried on eight tokens."""
    if head is None or model.base_model is model:
        return False
    tokens = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    h = model.base_model(tokens, use_cache=False)[0]
    if h.shape[-1] != head.weight.shape[-1]:
        return False
    logits = model(tokens, use_cache=False).logits
    return torch.allclose(F.linear(h, head.weight, head.bias), logits, rtol=1e-5, atol=1e-5)

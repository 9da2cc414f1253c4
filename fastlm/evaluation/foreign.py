"""Any Hugging Face causal model as something to score, through transformers (extra hf): GPT-2 for the baseline row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from fastlm import kernels
from fastlm.errors import UserError, check
from fastlm.evaluation.score import LOGIT_ROWS, Logps


def open_foreign(folder: Path, kind: str, device: torch.device) -> tuple[Logps, int, int]:
    """A function that scores with the folder's model, its longest text in tokens, and its vocabulary size.

    Raises UserError where transformers is missing, does not know the architecture, or the weights do not fit it.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"{folder}: architecture {kind} needs transformers; install it: pip install 'fastlm[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"transformers could not load {folder} ({kind}): {reason}") from None
    model, info = loaded
    missing = sorted(info["missing_keys"])
    check(not missing, f"{folder}: tensor {missing[0] if missing else ''} is missing from its safetensors files")
    longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    return score_with(model.to(device).eval()), longest, model.config.vocab_size


def score_with(model: Any) -> Logps:
    """log p of targets: through the fused head where the model is a trunk and a head, else through its own logits."""
    head = model.get_output_embeddings()
    probe = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    fused = False
    if head is not None and model.base_model is not model:
        h = model.base_model(probe, use_cache=False)[0]
        if h.shape[-1] == head.weight.shape[-1]:
            by_parts = F.linear(h, head.weight, head.bias)
            fused = torch.allclose(by_parts, model(probe, use_cache=False).logits, rtol=1e-5, atol=1e-5)

    def through_head(tokens: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        h = model.base_model(tokens, use_cache=False)[0].flatten(0, 1)[index]
        return kernels.linear_logprobs(h, head.weight, targets, bias=head.bias)

    def through_logits(tokens: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens, use_cache=False).logits.flatten(0, 1)
        parts = zip(index.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        return torch.cat([logits[i].float().log_softmax(-1).gather(1, t[:, None])[:, 0] for i, t in parts])

    return through_head if fused else through_logits

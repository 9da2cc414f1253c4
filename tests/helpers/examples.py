"""What tests of examples look at."""

from __future__ import annotations

import numpy as np

from fastlm.data.examples.templates import EncodedSequence
from fastlm.tokenizer import Tokenizer


def counted_text(example: EncodedSequence, tokenizer: Tokenizer) -> list[str]:
    """The counted tokens, run by run."""
    runs: list[list[int]] = []
    last = None
    for n in np.flatnonzero(example.counted).tolist():
        if last != n - 1:
            runs.append([])
        runs[-1].append(int(example.ids[n]))
        last = n
    return [tokenizer.decode(run) for run in runs]

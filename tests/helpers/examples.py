"""What tests of examples look at."""

from __future__ import annotations


def counted_text(example, tokenizer):
    """The counted tokens, run by run."""
    runs, last = [], None
    for n in np.flatnonzero(example.counted).tolist():
        if last != n - 1:
            runs.append([])
        runs[-1].append(int(example.ids[n]))
        last = n
    return [tokenizer.decode(run) for run in runs]

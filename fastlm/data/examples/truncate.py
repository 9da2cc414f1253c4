"""Examples cut to a length: the response is kept, the oldest part of the prompt goes first."""

from __future__ import annotations

import numpy as np

from fastlm.data.examples.report import Report
from fastlm.data.examples.templates import EncodedSequence

MIN_PROMPT_SHARE = 0.25  # of the limit: what is left of a longer prompt at least


def response_start(sequence: EncodedSequence) -> int:
    """Where the last response starts."""
    uncounted = np.flatnonzero(~sequence.counted)
    return int(uncounted[-1]) + 1 if len(uncounted) else 0


def last_response(sequence: EncodedSequence) -> EncodedSequence:
    """The same ids with only the last response counted."""
    return EncodedSequence(sequence.ids, np.arange(len(sequence.ids)) >= response_start(sequence))


def truncate(sequence: EncodedSequence, limit: int, report: Report) -> EncodedSequence | None:
    """At most `limit` ids: the oldest part of the prompt goes first, then the end of the response.

    None if nothing is counted in what is left.
    """
    start = response_start(sequence)
    prompt, response = _lengths(start, len(sequence.ids) - start, limit)
    report.prompts_truncated += prompt < start
    report.responses_truncated += start + response < len(sequence.ids)
    short = _cut(sequence, start - prompt, start + response)
    if not short.counted[1:].any():
        report.dropped += 1
        return None
    return short


def truncate_pair(
    chosen: EncodedSequence, rejected: EncodedSequence, limit: int, report: Report
) -> list[EncodedSequence] | None:
    """Both sequences at most `limit` ids, with the same part of the prompt.

    None where the answers no longer differ, or nothing is counted in what is left of one.
    """
    start = response_start(chosen)
    longest = max(len(chosen.ids), len(rejected.ids)) - start
    prompt, response = _lengths(start, longest, limit)
    report.prompts_truncated += prompt < start
    report.responses_truncated += response < longest
    pair = [_cut(side, start - prompt, start + response) for side in (chosen, rejected)]
    if np.array_equal(pair[0].ids, pair[1].ids) or not all(side.counted[1:].any() for side in pair):
        report.dropped += 1
        return None
    return pair


def _cut(sequence: EncodedSequence, start: int, stop: int) -> EncodedSequence:
    return EncodedSequence(sequence.ids[start:stop], sequence.counted[start:stop])


def _lengths(prompt: int, response: int, limit: int) -> tuple[int, int]:
    """How many ids of a prompt and a response are kept."""
    if prompt + response <= limit:
        return prompt, response
    least_prompt = min(prompt, max(1, int(limit * MIN_PROMPT_SHARE)))
    prompt = max(least_prompt, min(prompt, limit - response))
    return prompt, min(response, limit - prompt)

"""Truncation keeps the response and one prompt for both sides of a pair, and is counted."""

import numpy as np
import pytest

from fastlm.data.examples.load import Report, truncate, truncate_pair
from fastlm.data.examples.templates import EncodedSequence


def make(prompt, response):
    return EncodedSequence(
        np.arange(prompt + response, dtype=np.int32), np.arange(prompt + response) >= prompt
    )


@pytest.mark.parametrize(
    ("prompt", "response", "kept_prompt", "kept_response", "counts"),
    [
        (10, 10, 10, 10, (0, 0, 0)),
        (50, 10, 30, 10, (1, 0, 0)),  # the oldest part of the prompt goes
        (50, 35, 10, 30, (1, 1, 0)),  # a quarter is left for the prompt, the response is cut
        (3, 60, 3, 37, (0, 1, 0)),
    ],
)
def test_truncation_keeps_the_response_and_is_counted(
    prompt, response, kept_prompt, kept_response, counts
):
    report = Report("x")
    short = truncate(make(prompt, response), 40, report)
    assert short.ids.tolist() == list(range(prompt - kept_prompt, prompt + kept_response))
    assert short.counted.tolist() == [False] * kept_prompt + [True] * kept_response
    assert (report.prompts_truncated, report.responses_truncated, report.dropped) == counts


def test_both_sides_of_a_pair_keep_the_same_prompt():
    report = Report("x")
    chosen, rejected = make(50, 5), make(50, 20)
    pair = truncate_pair(chosen, rejected, 40, report)
    assert [len(side.ids) for side in pair] == [25, 40]
    assert pair[0].ids[:20].tolist() == pair[1].ids[:20].tolist() == list(range(30, 50))
    assert (report.prompts_truncated, report.responses_truncated) == (1, 0)
    # Cut to the same ids: nothing to prefer.
    assert truncate_pair(make(5, 60), make(5, 70), 40, report) is None
    assert report.dropped == 1

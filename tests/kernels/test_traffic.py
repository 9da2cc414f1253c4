"""Bytes moved against the floor, counted in the interpreter."""

from __future__ import annotations

import pytest
import torch

from fastlm.kernels.audit.configurations import cases
from fastlm.kernels.audit.traffic import counting, measure

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="with a GPU the kernels are compiled, and nothing is counted",
    ),
    pytest.mark.usefixtures("triton_only"),
]


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_at_most_1_02_of_the_floor(case):
    counted = measure(case)
    assert counted["floor"] * 0.999 <= counted["moved"] <= counted["floor"] * 1.02


def test_a_copy_counts_its_bytes_once_each_way():
    from fastlm.kernels.triton import swiglu

    with counting() as meter:
        swiglu.forward(torch.ones(3, 2 * 70))
    assert meter.streamed == 3 * 70 * 3 * 4

"""Each width's block size, in each dtype, for each architecture.

What check_aot.py samples, whole (make architectures).
"""

from __future__ import annotations

import pytest
import torch
from check_aot import check

from fastlm.kernels.audit import inspect
from fastlm.kernels.audit.configurations import cases

EVERY = [
    case
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for case in cases(dtype, every_width=True)
]


@pytest.mark.parametrize("target", inspect.TARGETS)
@pytest.mark.parametrize("case", EVERY, ids=lambda c: c.name)
def test_it_builds(case, target):
    check(case, target)

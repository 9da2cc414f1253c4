"""More than 2^31 elements: rows so far apart that a 32-bit offset would wrap.

Little of the memory is ever touched.
"""

from __future__ import annotations

import pytest
import torch
from exactness import same_bits

from fastlm import kernels

pytestmark = pytest.mark.usefixtures("triton_only")
APART = 2**31 + 16  # elements


@pytest.fixture
def far(device):
    """Two rows of 64 numbers, the second 2^31 elements behind the first, and their copies side by
    side.
    """
    near = torch.randn(2, 64, device=device).bfloat16()
    rows = torch.empty(APART + 64, dtype=torch.bfloat16, device=device).as_strided(
        (2, 64), (APART, 1)
    )
    rows.copy_(near)
    return rows, near


OPS = {
    "rms_norm": lambda x: kernels.rms_norm(x, torch.ones(64, device=x.device), 1e-5),
    "swiglu": kernels.swiglu,
    "cross_entropy": lambda x: kernels.cross_entropy(
        x, torch.tensor([63, 1], device=x.device), reduction="none"
    ),
    "rope": lambda x: kernels.rope(
        *[x.view(1, 2, 2, 32)] * 2, *torch.randn(2, 2, 16, device=x.device, generator=SEED)
    )[0],
}
SEED = torch.Generator()


@pytest.mark.parametrize("name", [n for n in OPS if n != "rope" or not torch.cuda.is_available()])
def test_offsets_do_not_wrap(name, far):
    results = []
    for x in far:
        SEED.manual_seed(0)
        leaf = x.detach().requires_grad_()
        y = OPS[name](leaf)
        results.append((y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0]))
    (y, dx), (expected, expected_dx) = results
    assert same_bits(y, expected)
    assert same_bits(dx, expected_dx)

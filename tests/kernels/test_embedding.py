"""The embedding's look-up and gradient against one-hot matmuls in float64, and the same bits on every run."""

from __future__ import annotations

import pytest
import torch

from fastlm import kernels
from fastlm.kernels.embedding import _embedding, _embedding_backward, embedding_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 17), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_and_gradient_equal_one_hot_matmuls(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 7, generator=generator).to(DEVICE, dtype).requires_grad_()
    ids = torch.randint(11, shape, generator=generator).to(DEVICE)
    y = kernels.embedding(ids, weight)
    dy = torch.randn(*shape, 7, generator=generator).to(DEVICE, dtype)
    y.backward(dy)
    if ids.numel():
        assert torch.equal(y, embedding_reference(ids, weight))
    one_hot = torch.nn.functional.one_hot(ids.flatten(), 11).double()
    expected = one_hot.T @ dy.double().reshape(-1, 7)
    assert weight.grad.dtype == dtype
    torch.testing.assert_close(weight.grad.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_the_operators_pass_opcheck():
    weight, ids = torch.randn(11, 7, device=DEVICE, requires_grad=True), torch.randint(11, (3, 4), device=DEVICE)
    torch.library.opcheck(_embedding, (ids, weight))
    torch.library.opcheck(_embedding_backward, (torch.randn(3, 4, 7, device=DEVICE), ids, 11))


def test_the_gradient_has_the_same_bits_on_every_run_compiled_too():
    """Many threads adding to few rows, in fp32, where the order of additions shows."""
    ids = torch.randint(5, (20_000,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    dy = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradient(function):
        weight = torch.zeros(5, 16, device=DEVICE, requires_grad=True)
        (function(ids, weight) * dy).sum().backward()
        return weight.grad

    compiled = torch.compile(kernels.embedding, fullgraph=True)
    first = gradient(kernels.embedding)
    assert all(torch.equal(gradient(f), first) for f in (kernels.embedding, compiled, compiled, compiled))


def test_a_weight_that_is_no_table_is_named():
    with pytest.raises(ValueError, match="expected \\(V, D\\)"):
        kernels.embedding(torch.zeros(2, dtype=torch.long), torch.zeros(3))

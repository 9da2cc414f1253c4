"""The embedding's look-up and gradient against one-hot matmuls in float64, and the same bits on
every run.
"""

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
    torch.testing.assert_close(
        weight.grad.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )


def test_the_operators_pass_opcheck():
    weight, ids = (
        torch.randn(11, 7, device=DEVICE, requires_grad=True),
        torch.randint(11, (3, 4), device=DEVICE),
    )
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
    assert all(
        torch.equal(gradient(f), first) for f in (kernels.embedding, compiled, compiled, compiled)
    )


def test_a_weight_that_is_no_table_is_named():
    with pytest.raises(ValueError, match="expected \\(V, D\\)"):
        kernels.embedding(torch.zeros(2, dtype=torch.long), torch.zeros(3))
    with pytest.raises(ValueError, match="expected \\(V, D\\)"):
        kernels.tied_embedding(torch.zeros(2, dtype=torch.long), torch.zeros(3))


def tied_loss(embed, ids, weight, factor):
    """Twice the same table: rows in, and a head whose gradient is dense."""
    rows, head = embed(ids, weight)
    return (torch.tanh(rows @ factor) @ head.T).logsumexp(-1).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 17)])
def test_a_tied_table_s_gradient_is_the_sum_of_the_rows_and_the_head_s(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, shape, generator=generator).to(DEVICE)
    weight, factor = torch.randn(11, 7, generator=generator), torch.randn(7, 7, generator=generator)
    truth = weight.double().to(DEVICE).requires_grad_()
    tied_loss(
        lambda ids, w: (embedding_reference(ids, w) if ids.numel() else w[ids], w),
        ids,
        truth,
        factor.double().to(DEVICE),
    ).backward()
    torch._dynamo.reset()
    for embed in (kernels.tied_embedding, torch.compile(kernels.tied_embedding, fullgraph=True)):
        ours = weight.to(DEVICE, dtype, copy=True).requires_grad_()
        tied_loss(embed, ids, ours, factor.to(DEVICE, dtype)).backward()
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
        assert (ours.grad.double() - truth.grad).norm() <= tolerance * truth.grad.norm()


def test_a_tied_table_s_gradient_survives_a_second_backward_and_a_head_that_is_not_used():
    ids, dy = torch.tensor([1, 1, 3], device=DEVICE), torch.randn(3, 4, device=DEVICE)
    weight = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, 4, 2], device=DEVICE)
    rows, head = kernels.tied_embedding(ids, weight)
    loss = kernels.linear_cross_entropy(rows, head, targets, reduction="sum")
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(weight.grad, 3 * once)
    assert torch.equal(kernels.tied_embedding(ids, weight)[0], kernels.embedding(ids, weight))
    weight.grad = None
    kernels.tied_embedding(ids, weight)[0].backward(dy)
    expected = torch.zeros(5, 4, device=DEVICE).index_add_(0, ids, dy)
    torch.testing.assert_close(weight.grad, expected)
    weight.grad = None
    kernels.tied_embedding(ids, weight)[1].sum().backward()  # a gradient without memory of its own
    assert torch.equal(weight.grad, torch.ones(5, 4, device=DEVICE))


def test_a_tied_table_s_gradient_is_the_head_s_block(cpu_path):
    """No second (V, D) block: what the head's backward gave out is what the table gets."""
    weight, seen = torch.randn(50, 4, requires_grad=True), []
    rows, head = kernels.tied_embedding(torch.tensor([1, 1, 3]), weight)
    head.register_hook(lambda g: seen.append(g.data_ptr()))
    kernels.linear_cross_entropy(rows, head, torch.tensor([0, 4, 2])).backward()
    assert seen == [weight.grad.data_ptr()]

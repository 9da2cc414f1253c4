"""SwiGLU against float64."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, check, run, same_bits, unaligned
from plain_ops import swiglu as plain

from fastlm.kernels import swiglu, swiglu_linear
from fastlm.kernels.swiglu import _swiglu_backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 127, 768, 1000, 1024, 1536, 4096, 8192])
def test_product_and_gradients_against_float64(width, dtype, device):
    x, g = 3 * torch.randn(3, 2 * width, device=device), torch.randn(3, width, device=device)
    check(swiglu, plain, [x.to(dtype)], [g.to(dtype)])


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (33, 64), (2, 3, 5, 14)])
def test_every_number_of_rows_and_dimensions(shape, device):
    x = torch.randn(*shape[:-1], 2 * shape[-1], device=device)
    check(swiglu, plain, [x], [torch.randn(shape, device=device)])


@pytest.mark.parametrize("size", [20.0, 100.0, 1e4, 3e38])
def test_large_gates_saturate_without_overflow(size, device):
    x = torch.tensor([[size, -size, 1.0, 0.5]], device=device)
    check(swiglu, plain, [x], [torch.tensor([[0.25, 0.25]], device=device)])


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced columns", "unaligned"])
def test_strided_and_unaligned_inputs_and_gradients(kind, device):
    make = {
        "expanded": lambda n: torch.randn(1, n, device=device).expand(6, n),
        "transposed": lambda n: torch.randn(n, 6, device=device).t(),
        "sliced columns": lambda n: torch.randn(6, 200, device=device)[:, 3 : 3 + n],
        "unaligned": lambda n: unaligned(torch.randn(6, n, device=device)),
    }[kind]
    x, g = make(128), make(64)
    actual = run(swiglu, [x.detach().requires_grad_()], [g])
    expected = run(swiglu, [x.contiguous().clone().requires_grad_()], [g.contiguous().clone()])
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 768])
def test_the_backward_writes_the_forward_again_to_the_bit(width, dtype, device):
    x, g = (
        torch.randn(5, 2 * width, device=device).to(dtype),
        torch.randn(5, width, device=device).to(dtype),
    )
    dx, y = _swiglu_backward(g, x, True)
    assert same_bits(y, swiglu(x)), (y.float() - swiglu(x).float()).abs().max().item()
    assert same_bits(dx, _swiglu_backward(g, x, False)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kept_product_gives_the_bits_of_one_made_again(dtype, device):
    inputs, g = (
        [torch.randn(5, 128, device=device).to(dtype), torch.randn(9, 64, device=device).to(dtype)],
        torch.randn(5, 9),
    )
    saved: dict[bool, list] = {False: [], True: []}
    results = []
    for keep, seen in saved.items():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.append(t.shape) or t, lambda t: t
        ):
            leaves = [x.clone().requires_grad_() for x in inputs]
            results.append(
                run(lambda x, w, keep=keep: swiglu_linear(x, w, keep), leaves, [g.to(device)])
            )
    assert all(map(same_bits, *results))
    assert torch.Size((5, 64)) in saved[True]
    assert torch.Size((5, 64)) not in saved[False]


def test_an_odd_width_is_named(device):
    with pytest.raises(ValueError, match="odd last dimension, 7"):
        swiglu(torch.randn(2, 7, device=device))

"""RMSNorm and add + RMSNorm against float64."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, check, run, same_bits, unaligned
from plain_ops import EPS, rms_norm_in_fp32
from plain_ops import add_rms_norm as plain_add
from plain_ops import rms_norm as plain

from fastlm.kernels import add_rms_norm, rms_norm

WIDTHS = [1, 7, 64, 127, 768, 1000, 1024, 1536, 4096, 8192]


def ours(x, w):
    return rms_norm(x, w, EPS)


def ours_add(x, r, w):
    return add_rms_norm(x, r, w, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_and_gradients_against_float64(width, dtype, device):
    x, g = torch.randn(2, 5, width, device=device).to(dtype).unbind(0)
    # one column wide, dx is what is left of two equal numbers' difference: only its size beside
    # them means anything
    check(
        ours,
        rms_norm_in_fp32,
        [x, torch.randn(width, device=device)],
        [g],
        scale=1000 if width == 1 else 1,
    )


@pytest.mark.parametrize("width", [7, 768, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_added_norm_and_gradients_against_float64(width, dtype, device):
    # values on a coarse grid: the sum is exact in every dtype, so that the float64 truth normalises
    # the same sum
    x, r = ((torch.randn(2, 5, width, device=device) * 4).round() / 4).to(dtype).unbind(0)
    g, h = torch.randn(2, 5, width, device=device).to(dtype).unbind(0)
    check(ours_add, plain_add, [x, r, torch.randn(width, device=device)], [g, h])


@pytest.mark.parametrize("rows", [0, 1, 3, 73, 161])
@pytest.mark.parametrize("width", [64, 1000])
def test_every_number_of_rows(rows, width, device):
    x, g = torch.randn(2, rows, width, device=device).unbind(0)
    check(ours, plain, [x, torch.randn(width, device=device)], [g])


def test_no_rows_give_a_zero_weight_gradient(device):
    x, w = (
        torch.randn(0, 64, device=device, requires_grad=True),
        torch.randn(64, device=device, requires_grad=True),
    )
    rms_norm(x, w, EPS).sum().backward()
    assert x.grad.shape == (0, 64)
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_the_sum_is_rounded_before_it_is_normalised(device):
    x, r = torch.randn(2, 4, 64, device=device).bfloat16().unbind(0)
    w = torch.randn(64, device=device)
    y, s = add_rms_norm(x, r, w, EPS)
    assert same_bits(s, x + r)
    assert same_bits(y, rms_norm(s, w, EPS))


@pytest.mark.parametrize(
    "kind", ["expanded rows", "expanded scalar", "transposed", "sliced columns", "unaligned"]
)
def test_strided_and_unaligned_inputs_and_gradients(kind, device):
    make = {
        "expanded rows": lambda: torch.randn(1, 64, device=device).expand(6, 64),
        "expanded scalar": lambda: torch.randn(1, 1, device=device).expand(6, 64),
        "transposed": lambda: torch.randn(64, 6, device=device).t(),
        "sliced columns": lambda: torch.randn(6, 100, device=device)[:, 3:67],
        "unaligned": lambda: unaligned(torch.randn(6, 64, device=device)),
    }[kind]
    w = torch.randn(64, device=device)
    given = [make(), make()]
    copies = [t.contiguous().clone() for t in given]
    for i in range(2):  # the gradient alone, then the input too
        x = given[0] if i else copies[0]
        actual = run(ours, [x.detach().requires_grad_(), w.clone().requires_grad_()], [given[1]])
        expected = run(
            ours, [copies[0].clone().requires_grad_(), w.clone().requires_grad_()], [copies[1]]
        )
        assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


def test_only_the_sum_is_used(device):
    x, r, w = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(3))
    w = torch.randn(8, device=device, requires_grad=True)
    add_rms_norm(x, r, w, EPS)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(r.grad, torch.ones_like(x))
    assert w.grad is None or not w.grad.any()


def test_eps_counts_where_the_row_is_tiny(device):
    x = torch.full((2, 64), 1e-4, device=device)
    y = rms_norm(x, torch.ones(64, device=device), 1e-6)
    torch.testing.assert_close(y, x / (1e-8 + 1e-6) ** 0.5)
    assert not rms_norm(torch.zeros_like(x), torch.ones(64, device=device), 1e-6).any()


def test_backward_twice_through_a_kept_graph(device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    y = rms_norm(x, torch.randn(64, device=device, requires_grad=True), EPS).square().sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    y.backward()
    assert same_bits(x.grad, first)


def test_more_rows_than_one_partial_sum_holds(device):
    """dw over several programs, each with several tiles."""
    x, g = torch.randn(2, 450, 64, device=device).unbind(0)
    check(ours, plain, [x, torch.randn(64, device=device)], [g])


def test_mistakes_are_named(device):
    x, w = torch.randn(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match="rms_norm: weight has shape"):
        rms_norm(x, w[:4], EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, x[:1], w, EPS)
    with pytest.raises(TypeError, match="residual"):
        add_rms_norm(x, x.half(), w, EPS)
    with pytest.raises(ValueError, match="last dimension"):
        rms_norm(torch.empty(1, 8193, device=device), torch.empty(8193, device=device), EPS)

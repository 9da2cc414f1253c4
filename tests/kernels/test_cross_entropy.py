"""Cross-entropy of given logits against float64."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, check, check_once, run, same_bits, unaligned
from plain_ops import LOSS_OPTIONS
from plain_ops import cross_entropy as plain

from fastlm.kernels import cross_entropy


def make(rows, width, dtype, device, size=3.0):
    targets = torch.randint(width, (rows,), device=device)
    targets[rows // 2] = -100
    if rows > 2:
        targets[0], targets[1] = width - 1, 0
    return (size * torch.randn(rows, width, device=device)).to(dtype), targets


def upstream(reduction, rows, device):
    return [
        torch.randn(rows, device=device)
        if reduction == "none"
        else torch.tensor(0.7, device=device)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 64, 127, 1000, 4096, 8192])
def test_loss_and_gradient_against_float64(width, dtype, device):
    logits, targets = make(4, width, dtype, device)
    check(
        lambda z: cross_entropy(z, targets),
        lambda z: plain(z, targets),
        [logits],
        upstream("mean", 4, device),
    )


def test_a_vocabulary_of_one_is_certain(device):
    logits, targets = make(4, 1, torch.float32, device)
    loss, grad = run(
        lambda z: cross_entropy(z, targets),
        [logits.requires_grad_()],
        [torch.tensor(1.0, device=device)],
    )
    assert abs(loss.item()) < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(50257, torch.float32), (50257, torch.bfloat16), (131072, torch.bfloat16)],
    ids=str,
)
def test_large_vocabularies_against_float64(width, dtype, device):
    """50257: every row but one in 16 starts unaligned, so head, bulk and tail are all there."""
    logits, targets = make(2, width, dtype, device)
    targets[:] = width - 3
    options = {"reduction": "none", "z_loss": 1e-4, "label_smoothing": 0.1}
    up = upstream("none", 2, device)
    check_once(
        lambda z: cross_entropy(z, targets, **options),
        lambda z: plain(z, targets, **options),
        [logits],
        up,
    )


@pytest.mark.parametrize(
    "options", LOSS_OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values())
)
def test_every_combination_of_options(options, device):
    width = 37
    logits, targets = make(4, width, torch.float32, device)
    targets = targets.clamp(max=(options["vocab_size"] or width) - 1)
    check_once(
        lambda z: cross_entropy(z, targets, **options),
        lambda z: plain(z, targets, **options),
        [logits],
        upstream(options["reduction"], 4, device),
        scale=2,
    )


@pytest.mark.parametrize("width", [15, 16, 17, 22, 24, 31, 40])
def test_every_alignment_of_rows(width, device):
    """Each column counts exactly once in the loss and gets its gradient, whatever the row's start
    and width modulo 16.
    """
    logits, targets = make(16, width, torch.bfloat16, device)
    check_once(
        lambda z: cross_entropy(z, targets),
        lambda z: plain(z, targets),
        [logits],
        upstream("mean", 16, device),
    )


def test_target_in_every_column(device):
    """One row for each column as the target: head, bulk and tail all subtract the one."""
    logits = torch.randn(37, 37, device=device)
    targets = torch.arange(37, device=device)
    check_once(
        lambda z: cross_entropy(z, targets),
        lambda z: plain(z, targets),
        [logits],
        upstream("mean", 37, device),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"z_loss": 0.1, "label_smoothing": 0.1, "softcap": 2.0}],
    ids=["plain", "all options"],
)
def test_all_ignored_gives_zero_and_zero_gradients(reduction, options, device):
    logits = torch.randn(3, 37, device=device, requires_grad=True)
    logits.data[0, 0] = float("nan")  # what stands in an ignored row does not matter
    loss = cross_entropy(
        logits, torch.full((3,), -100, device=device), reduction=reduction, **options
    )
    loss.sum().backward()
    assert not loss.any()
    assert not logits.grad.any()


def test_another_ignore_index_inside_the_vocabulary(device):
    logits, targets = make(6, 37, torch.float32, device)
    targets = targets.clamp(min=0)
    targets[2:4] = 5
    options = {"ignore_index": 5}
    check(
        lambda z: cross_entropy(z, targets, **options),
        lambda z: plain(z, targets, **options),
        [logits],
        upstream("mean", 6, device),
    )


@pytest.mark.parametrize("target", [-1, -101, 37, 1 << 33, -(1 << 33)])
def test_a_target_out_of_range_makes_its_row_nan_and_no_other(target, device):
    logits = torch.randn(3, 37, device=device, requires_grad=True)
    targets = torch.tensor([4, target, 36], device=device)
    loss = cross_entropy(logits, targets, reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert logits.grad[1].isnan().all()
    good = torch.tensor([0, 2], device=device)
    torch.testing.assert_close(
        loss[good], plain(logits.detach()[good], targets[good], reduction="none")
    )
    assert logits.grad[good].isfinite().all()


@pytest.mark.parametrize("width", [37, 8200])
def test_minus_infinity_is_a_logit(width, device):
    """Banned tokens: whole stretches of -inf, wider than a lane's columns, at the start, inside and
    at the end.
    """
    logits, targets = make(4, width, torch.float32, device)
    targets = torch.full_like(targets, width // 2)
    logits[0, : width // 3] = float("-inf")
    logits[1, width // 2 + 1 :] = float("-inf")
    logits[2, 1:] = float("-inf")
    logits[2, width // 2] = 0.0
    loss, grad = run(
        lambda z: cross_entropy(z, targets, reduction="none"),
        [logits.clone().requires_grad_()],
        [torch.ones(4, device=device)],
    )
    truth = run(
        lambda z: plain(z, targets, reduction="none"),
        [logits.double().requires_grad_()],
        [torch.ones(4, device=device).double()],
    )
    torch.testing.assert_close(loss.double(), truth[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad.double(), truth[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits(size, device):
    """Offsets of 1e4: fp32 holds lse to 5e-4 there, so a probability to 1e-3 of itself at worst.

    No overflow.
    """
    logits, targets = make(4, 500, torch.float32, device)
    logits = (logits * 64).round() / 64 + size  # exact in fp32
    check(
        lambda z: cross_entropy(z, targets),
        lambda z: plain(z, targets),
        [logits],
        upstream("mean", 4, device),
        scale=2000,
    )


@pytest.mark.parametrize("kind", ["unaligned", "sliced columns", "transposed", "three dimensions"])
def test_strided_and_unaligned_logits(kind, device):
    logits, targets = make(6, 50, torch.float32, device)
    view = {
        "unaligned": lambda: unaligned(logits),
        "sliced columns": lambda: torch.cat((logits, logits), 1)[:, :50],
        "transposed": lambda: logits.t().contiguous().t(),
        "three dimensions": lambda: logits.view(2, 3, 50),
    }[kind]()
    t = targets.view(view.shape[:-1])
    up = torch.randn(t.shape, device=device)
    loss, grad = run(
        lambda z: cross_entropy(z, t, reduction="none"), [view.detach().requires_grad_()], [up]
    )
    expected = run(
        lambda z: cross_entropy(z, targets, reduction="none"),
        [logits.clone().requires_grad_()],
        [up.flatten()],
    )
    torch.testing.assert_close(loss.flatten(), expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad.reshape(6, 50), expected[1], atol=1e-7, rtol=1e-5)


def test_no_rows_and_one_row(device):
    empty = torch.randn(0, 37, device=device, requires_grad=True)
    loss = cross_entropy(empty, torch.empty(0, dtype=torch.long, device=device))
    loss.backward()
    assert loss.item() == 0
    assert empty.grad.shape == (0, 37)
    logits, target = torch.randn(1, 37, device=device), torch.tensor([3], device=device)
    check(
        lambda z: cross_entropy(z, target),
        lambda z: plain(z, target),
        [logits],
        upstream("mean", 1, device),
    )


def test_int32_targets(device):
    logits, targets = make(5, 37, torch.float32, device)
    assert same_bits(cross_entropy(logits, targets), cross_entropy(logits, targets.int()))


def test_mistakes_are_named(device):
    z, t = torch.randn(2, 8, device=device), torch.zeros(2, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        cross_entropy(z, t, reduction="avg")
    with pytest.raises(ValueError, match="targets"):
        cross_entropy(z, t[:1])
    with pytest.raises(ValueError, match="vocab_size is 9"):
        cross_entropy(z, t, vocab_size=9)
    with pytest.raises(ValueError, match="label_smoothing is 2"):
        cross_entropy(z, t, label_smoothing=2.0)
    with pytest.raises(ValueError, match="softcap is -1"):
        cross_entropy(z, t, softcap=-1.0)

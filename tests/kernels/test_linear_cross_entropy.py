"""Cross-entropy and log-probabilities behind the head's matmul, against float64 and against the
logits held whole.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from exactness import check, check_once, error, run, same_bits
from plain_ops import LOSS_OPTIONS
from plain_ops import cross_entropy as plain
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.kernels import cross_entropy, head_chunks, linear_cross_entropy, linear_logprobs
from fastlm.kernels.head_chunks import chunk_rows, cpu_chunk_bytes, gpu_chunk_rows
from fastlm.kernels.linear_cross_entropy import _linear_nll
from fastlm.kernels.loss_options import LossOptions

N, D, V = 12, 16, 37


def make(device, dtype=torch.float32, n=N, d=D, v=V):
    h, w, b = (
        torch.randn(n, d, device=device),
        torch.randn(v, d, device=device) * d**-0.5,
        torch.randn(v, device=device),
    )
    targets = torch.randint(v, (n,), device=device)
    targets[:: max(n // 4, 1)] = -100
    return h.to(dtype), w.to(dtype), b.to(dtype), targets


def behind(loss, targets, **options):
    """The same loss of materialised logits, as a function of (h, W, b)."""
    return lambda h, w, b: loss(F.linear(h, w, b), targets, **options)


@pytest.mark.parametrize(
    "options", LOSS_OPTIONS[::3], ids=lambda o: "-".join(str(v) for v in o.values())
)
def test_options_against_float64(options, device):
    h, w, b, targets = make(device, n=6)
    targets = targets.clamp(max=(options["vocab_size"] or V) - 1)
    up = [
        torch.randn(6, device=device)
        if options["reduction"] == "none"
        else torch.tensor(0.7, device=device)
    ]
    check_once(
        lambda h, w, b: linear_cross_entropy(
            h, w, targets, bias=b, chunk_bytes=4 * V * 4, **options
        ),
        behind(plain, targets, **options),
        [h, w, b],
        up,
        scale=2,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_whole_logits(dtype, reduction, device):
    """dh and dW go through logits' gradients rounded to the dtype, as PyTorch's do.

    DW is added up in fp32.
    """
    h, w, _, targets = make(device, dtype, n=16, d=64, v=130)
    up = [
        torch.randn(16, device=device) if reduction == "none" else torch.tensor(1.0, device=device)
    ]
    check_once(
        lambda h, w: linear_cross_entropy(
            h, w, targets, reduction=reduction, chunk_bytes=8 * 130 * 2
        ),
        lambda h, w: plain(h @ w.T, targets, reduction=reduction),
        [h, w],
        up,
        scale=5,
    )


def test_the_weight_gradient_does_not_get_worse_with_chunks(device):
    """64 chunks against 1, bf16: at most 1.1 times the error, which a bf16 accumulator would
    multiply.
    """
    h, w, _, targets = make(device, torch.bfloat16, n=64, d=32, v=64)
    truth = run(
        lambda h, w: plain(h @ w.T, targets),
        [x.double().requires_grad_() for x in (h, w)],
        [torch.ones((), device=device)],
    )[2]
    errors = []
    for chunks in (1, 64):
        leaf = w.float().requires_grad_()  # the caller's fp32 weights: the gradient comes in fp32
        linear_cross_entropy(h, leaf, targets, chunk_bytes=64 // chunks * 64 * 2).backward()
        errors.append(error(leaf.grad, truth))
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("chunk_bytes", [1, 3 * V * 4, 1 << 30])
def test_the_loss_does_not_depend_on_the_chunks(chunk_bytes, device):
    h, w, b, targets = make(device)
    whole = cross_entropy(F.linear(h, w, b), targets)
    torch.testing.assert_close(
        linear_cross_entropy(h, w, targets, bias=b, chunk_bytes=chunk_bytes),
        whole,
        atol=1e-6,
        rtol=1e-6,
    )


def test_chunks_hold_at_most_their_bytes():
    for n, v, size, limit in [
        (32768, 50304, 2, 256 << 20),
        (1000, 50257, 4, 256 << 20),
        (5, 37, 4, 1),
        (7, 37, 4, 1 << 20),
    ]:
        rows = chunk_rows(n, v * size, limit)
        assert rows == 1 or rows * v * size <= limit
    assert chunk_rows(32768, 50304 * 2, 256 << 20) % 128 == 0


H100, A100, RTX_3060 = (
    (79 << 30, 132),
    (79 << 30, 108),
    (12 << 30, 28),
)  # bytes of memory, multiprocessors


@pytest.mark.parametrize(("gpu", "depth"), [(H100, 1024), (H100, 768), (A100, 1024), (H100, 2048)])
def test_a_chunk_fills_a_large_gpu_with_whole_waves_of_dh(gpu, depth):
    """Tiles of 128 x 256, all but at most 3 in 100 of the multiprocessors busy in every wave, in a
    64th of the memory.
    """
    memory, multiprocessors = gpu
    rows = gpu_chunk_rows(32768, 50304 * 2, depth, memory, multiprocessors)
    tiles = rows / 128 * depth / 256
    waves = math.ceil(tiles / multiprocessors)
    assert tiles >= 0.96 * waves * multiprocessors
    assert 256 << 20 < rows * 50304 * 2 <= memory / 64


def test_the_rows_of_a_chunk_on_an_h100_and_on_small_gpus():
    assert gpu_chunk_rows(32768, 50304 * 2, 1024, *H100) == 12672
    assert gpu_chunk_rows(100, 50304 * 2, 1024, *H100) == 100
    assert gpu_chunk_rows(32768, 50304 * 2, 1024, *RTX_3060) * 50304 * 2 <= 256 << 20
    for n in (300, 32768):  # no wave of so many multiprocessors fits
        assert gpu_chunk_rows(n, 50304 * 2, 1024, 12 << 30, 132) == chunk_rows(
            n, 50304 * 2, 256 << 20
        )


@pytest.mark.parametrize("fused", [True, False], ids=["sum", "none"])
def test_all_ignored_gives_zero_and_zero_gradients(fused, device):
    h, w, b, targets = make(device)
    leaves = [x.requires_grad_() for x in (h, w, b)]
    targets.fill_(-100)
    for reduction in ("mean", "sum") if fused else ("none",):
        loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction=reduction).sum()
        grads = torch.autograd.grad(loss, leaves)
        assert loss.item() == 0
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_rows_and_one_row(n, reduction, device):
    h, w, b, _ = make(device)
    h, targets = h[:n], torch.arange(n, device=device)
    up = [torch.ones(n, device=device) if reduction == "none" else torch.tensor(1.0, device=device)]
    if n:
        check_once(
            lambda *x: linear_cross_entropy(*x[:2], targets, bias=x[2], reduction=reduction),
            behind(plain, targets, reduction=reduction),
            [h, w, b],
            up,
        )
    else:
        _, *grads = run(
            lambda *x: linear_cross_entropy(*x[:2], targets, bias=x[2], reduction=reduction),
            [x.requires_grad_() for x in (h, w, b)],
            up,
        )
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_bound_on_the_counted_rows_changes_nothing(reduction, device):
    h, w, b, targets = make(device)
    counted = int((targets != -100).sum())
    up = [
        torch.randn(N, device=device) if reduction == "none" else torch.tensor(1.0, device=device)
    ]
    results = [
        run(
            lambda *x, m=m: linear_cross_entropy(
                *x[:2], targets, bias=x[2], reduction=reduction, max_counted=m
            ),
            [x.detach().requires_grad_() for x in (h, w, b)],
            up,
        )
        for m in (counted, counted + 1, N, None)
    ]
    for other in results[1:]:
        for a, b_ in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b_, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("max_counted", [-1, 64])
def test_ignored_rows_take_no_part_in_the_matmuls_on_a_cpu(max_counted, cpu_path):
    from torch.utils.flop_counter import FlopCounterMode

    h, w, _, targets = make(torch.device("cpu"), n=64)
    flops = {}
    for share in (1, 4):
        kept = targets.clamp(min=0)
        kept[torch.arange(64) % share != 0] = -100
        # the op hides its matmuls from the counter: count its inside
        with FlopCounterMode(display=False) as counter:
            head = head_chunks.head_of(h, w, None, kept, -100, max_counted)
            head_chunks.loss_and_gradients(head, LossOptions(), 1 << 20, True, True)
        flops[share] = counter.get_total_flops()
    assert 0 < flops[4] * 4 == flops[1]


@pytest.mark.parametrize("kept_rows", [99, 150, 300])  # none, one and all of the chunks of 100
def test_kept_logits_give_the_bits_of_those_made_again(kept_rows, device):
    h, w, b, targets = make(device, n=300)
    up, results = torch.randn(300, device=device), []
    for rows in (0, kept_rows):
        leaves = [x.clone().requires_grad_() for x in (h, w, b)]
        loss, *_ = _linear_nll(*leaves, targets, LossOptions().flat(), 100 * V * 4, -1, rows)
        first = torch.autograd.grad(loss, leaves, up, retain_graph=True)
        assert all(map(same_bits, first, torch.autograd.grad(loss, leaves, up)))
        results.append([loss.detach(), *first])
    assert all(map(same_bits, *results))


def test_logits_are_kept_for_a_backward_on_a_cpu_up_to_a_limit(cpu_path, monkeypatch):
    h, w, _, targets = make(torch.device("cpu"))
    for limit, grad, chunk_bytes, rows in [
        (100, True, None, N),
        (5, True, None, 5),
        (100, True, 1 << 20, 0),
        (100, False, None, 0),
    ]:
        monkeypatch.setattr(head_chunks, "KEPT_BYTES", limit * V * 4)
        with torch.set_grad_enabled(grad), KeptRows() as seen:
            linear_logprobs(h.requires_grad_(), w, targets, chunk_bytes=chunk_bytes)
        assert seen.kept == [rows]


def test_logits_are_kept_where_the_caller_has_room_for_them(device):
    """As many bytes as he says, and never more rows than may count."""
    h, w, _, targets = make(device)
    counted = int((targets != -100).sum())
    for keep_rows, max_counted, rows in [
        (100, None, N),
        (5, None, 5),
        (100, counted, counted),
        (0, None, 0),
    ]:
        with KeptRows() as seen:
            linear_logprobs(
                h.requires_grad_(),
                w,
                targets,
                keep_bytes=keep_rows * V * 4,
                max_counted=max_counted,
            )
        assert seen.kept == [rows]


class KeptRows(TorchDispatchMode):
    """Notes how many rows of logits each call of linear_nll keeps."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.fastlm.linear_nll.default:
            self.kept.append(len(out[2]))
        return out


@pytest.mark.parametrize("frozen", ["h", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen, device):
    h, w, _, targets = make(device)
    for reduction in ("sum", "none"):
        both = [x.clone().requires_grad_() for x in (h, w)]
        linear_cross_entropy(*both, targets, reduction=reduction).sum().backward()
        one = [x.clone().requires_grad_(name != frozen) for name, x in (("h", h), ("weight", w))]
        linear_cross_entropy(*one, targets, reduction=reduction).sum().backward()
        for name, a, b in zip(("h", "weight"), both, one, strict=True):
            assert b.grad is None if name == frozen else same_bits(a.grad, b.grad)


def test_same_loss_with_and_without_gradients_and_backward_twice(device):
    h, w, _, targets = make(device)
    leaf = h.clone().requires_grad_()
    loss = linear_cross_entropy(leaf, w, targets)
    assert same_bits(loss.detach(), linear_cross_entropy(h, w, targets))
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert same_bits(first, torch.autograd.grad(loss, leaf)[0])


def test_upstream_gradients_scale_the_result(device):
    h, w, _, targets = make(device)
    grads = [
        run(
            lambda x: linear_cross_entropy(x, w, targets),
            [h.clone().requires_grad_()],
            [torch.tensor(s, device=device)],
        )[1]
        for s in (1.0, -2.0)
    ]
    assert same_bits(grads[1], -2 * grads[0])


def test_padded_columns_take_no_part(device):
    """Garbage in the padding rows of W (even inf and NaN would do) changes neither the loss nor dh,
    and its gradient is 0.
    """
    h, w, _, targets = make(device)
    padded = torch.cat((w, 1e6 * torch.randn(27, D, device=device)))
    up = [torch.tensor(1.0, device=device)]
    loss, dh, dw = run(
        lambda x, y: linear_cross_entropy(x, y, targets, vocab_size=V),
        [h.clone().requires_grad_(), padded.requires_grad_()],
        up,
    )
    expected = run(
        lambda x, y: linear_cross_entropy(x, y, targets),
        [h.clone().requires_grad_(), w.clone().requires_grad_()],
        up,
    )
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(dh, expected[1])
    torch.testing.assert_close(dw[:V], expected[2])
    assert not dw[V:].any()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_log_probabilities_against_float64(softcap, device):
    h, w, b, targets = make(device)

    def truth(h, w, b):
        return -plain(F.linear(h, w, b), targets, reduction="none", softcap=softcap)

    check(
        lambda h, w, b: linear_logprobs(
            h, w, targets, bias=b, softcap=softcap, chunk_bytes=5 * V * 4
        ),
        truth,
        [h, w, b],
        [torch.randn(N, device=device)],
        scale=2,
    )


def test_dpo_loss_of_equal_policy_and_reference_is_exactly_ln_2(device):
    """Rafailov et al. 2023, equation 7, on log-probabilities taken with and without gradients."""
    h, w, _, targets = make(device, torch.bfloat16, n=32)
    logps = linear_logprobs(h.requires_grad_(), w, targets).view(4, 8).sum(1)
    with torch.no_grad():
        reference = linear_logprobs(h, w, targets).view(4, 8).sum(1)
    margin = 0.1 * ((logps - reference)[:2] - (logps - reference)[2:])
    assert (-F.logsigmoid(margin)).tolist() == [torch.tensor(math.log(2.0)).item()] * 2


def test_log_probabilities_where_ignored_or_out_of_range(device):
    h, w, _, targets = make(device)
    targets[1], targets[2] = -100, V
    logps = linear_logprobs(h, w, targets)
    assert logps[1].item() == 0
    assert logps[2].isnan()
    assert logps.dtype == torch.float32


def test_mistakes_are_named(device):
    h, w, b, t = make(device)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: h \(12, 15\)"):
        linear_cross_entropy(h[:, :15], w, t)
    with pytest.raises(ValueError, match=r"linear_logprobs: targets"):
        linear_logprobs(h, w, t[:3])
    with pytest.raises(ValueError, match=r"bias \(3,\)"):
        linear_logprobs(h, w, t, bias=b[:3])


def test_a_cpu_takes_logits_by_the_size_of_the_weight_within_bounds_of_rows_and_bytes():
    assert chunk_rows(2048, 50304 * 4, cpu_chunk_bytes(50304, 64, 4)) == 256
    assert chunk_rows(2048, 50304 * 4, cpu_chunk_bytes(50304, 384, 4)) == 384
    assert chunk_rows(2048, 50304 * 4, cpu_chunk_bytes(50304, 1024, 4)) == 512
    assert cpu_chunk_bytes(1024, 512, 4) == 50 << 20
    assert cpu_chunk_bytes(131072, 1024, 4) == 200 << 20

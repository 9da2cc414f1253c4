"""RoPE against complex multiplication in float64, and Hugging Face's rotate-half form."""

from __future__ import annotations

import pytest
import torch
from exactness import DTYPES, check, error, run, same_bits
from plain_ops import LENGTH, rotary_table, rotate

from fastlm.kernels import rope


def case(heads, kv_heads, width, dtype, device, with_positions):
    q, dq = torch.randn(2, 2, 5, heads, width, device=device).to(dtype).unbind(0)
    k, dk = torch.randn(2, 2, 5, kv_heads, width, device=device).to(dtype).unbind(0)
    positions = (
        torch.tensor([[0, 1, 2, 0, 1], [LENGTH - 1, 7, 7, 3, 0]], device=device)
        if with_positions
        else None
    )
    return [q, k], [dq, dk], rotary_table(width, device), positions


@pytest.mark.parametrize("with_positions", [False, True], ids=["counted", "given positions"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(16, 16, 64), (9, 3, 64), (4, 1, 128), (3, 3, 6), (1, 1, 2), (2, 1, 96)],
)
def test_rotation_and_gradients_against_float64(
    heads, kv_heads, width, dtype, with_positions, device
):
    inputs, upstream, (cos, sin), positions = case(
        heads, kv_heads, width, dtype, device, with_positions
    )
    at = torch.arange(5, device=device).unsqueeze(0) if positions is None else positions

    def plain(q, k):
        return rotate(q, cos[at], sin[at]), rotate(k, cos[at], sin[at])

    check(lambda q, k: rope(q, k, cos, sin, positions), plain, inputs, upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tables_cost_16_bit_results_nothing(dtype, device):
    """The root mean square error against float64 with fp16 cos and sin is within 2% of that with
    fp32 ones in bf16.
    """
    at = torch.arange(0, 1024, 16, device=device).double()
    angles = torch.outer(at, 1e4 ** -(torch.arange(32, device=device).double() / 32))
    q = torch.randn(1, len(at), 8, 64, device=device).to(dtype)
    true = rotate(q.double(), angles.cos(), angles.sin())
    wide, narrow = (
        (rope(q, q, angles.cos().to(t), angles.sin().to(t))[0].double() - true)
        .square()
        .mean()
        .sqrt()
        .item()
        for t in (torch.float32, torch.float16)
    )
    assert narrow <= (1.02 if dtype == torch.bfloat16 else 1.6) * wide


def test_equals_hugging_face_rotate_half(device):
    (q, k), _, (cos, sin), positions = case(4, 2, 64, torch.float32, device, True)
    actual = rope(q, k, cos, sin, positions)
    c, s = (torch.cat((t, t), -1)[positions].unsqueeze(2) for t in (cos, sin))
    for x, y in zip((q, k), actual, strict=True):
        half = torch.cat((-x[..., 32:], x[..., :32]), -1)
        assert error(y, (x * c + half * s).double()) < 2e-7


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_packed_projection_needs_no_copy(kv_heads, device):
    """q and k as views of one packed (B, T, (H + 2 Hkv) Dh).

    The same bits as from copies, the gradient lands in place.
    """
    heads, width = 4, 24
    packed = torch.randn(2, 5, (heads + 2 * kv_heads) * width, device=device, requires_grad=True)
    cos, sin = rotary_table(width, device)

    def of_views(z):
        q, k, _ = z.view(2, 5, -1, width).split([heads, kv_heads, kv_heads], 2)
        return rope(q, k, cos, sin)

    q, k, v = packed.detach().view(2, 5, -1, width).split([heads, kv_heads, kv_heads], 2)
    up = [torch.randn(x.shape, device=device) for x in (q, k)]
    q1, k1, dz = run(of_views, [packed], up)
    q2, k2, dq, dk = run(
        lambda a, b: rope(a, b, cos, sin), [x.contiguous().requires_grad_() for x in (q, k)], up
    )
    assert same_bits(q1, q2)
    assert same_bits(k1, k2)
    assert same_bits(dz.view(2, 5, -1, width), torch.cat((dq, dk, torch.zeros_like(v)), 2))


def test_heads_first_layout_and_expanded_gradient(device):
    q, k = (torch.randn(2, 3, 5, 8, device=device).transpose(1, 2) for _ in range(2))
    cos, sin = rotary_table(8, device)
    up = [torch.ones((), device=device).expand(2, 5, 3, 8)] * 2
    actual = run(lambda a, b: rope(a, b, cos, sin), [q.requires_grad_(), k.requires_grad_()], up)
    copies = [x.detach().contiguous().requires_grad_() for x in (q, k)]
    expected = run(lambda a, b: rope(a, b, cos, sin), copies, [u.contiguous() for u in up])
    assert all(
        same_bits(a.contiguous(), b.contiguous()) for a, b in zip(actual, expected, strict=True)
    )


def test_int32_positions_and_lengths_are_kept(device):
    (q, k), _, (cos, sin), positions = case(2, 2, 64, torch.float32, device, True)
    a, b = rope(q, k, cos, sin, positions), rope(q, k, cos, sin, positions.int())
    assert same_bits(a[0], b[0])
    assert same_bits(a[1], b[1])
    assert error(a[0].norm(dim=-1), q.double().norm(dim=-1)) < 1e-6


def test_positions_outside_the_table_give_nan_there_and_nothing_else(device, triton_only):
    (q, k), _, (cos, sin), _ = case(2, 1, 8, torch.float32, device, False)
    positions = torch.tensor([[0, LENGTH, 2, -1, 4], [1 << 40, 1, 2, 3, 4]], device=device)
    bad = (positions < 0) | (positions >= LENGTH)
    for x in rope(q, k, cos, sin, positions):
        assert x[bad].isnan().all()
        assert x[~bad].isfinite().all()


def test_no_tokens(device):
    cos, sin = rotary_table(8, device)
    q, k = rope(
        torch.randn(0, 5, 2, 8, device=device), torch.randn(0, 5, 1, 8, device=device), cos, sin
    )
    assert q.shape == (0, 5, 2, 8)
    assert k.shape == (0, 5, 1, 8)


def test_mistakes_are_named(device):
    q, cos = torch.randn(1, 5, 2, 8, device=device), torch.randn(4, 4, device=device)
    with pytest.raises(ValueError, match="5 tokens but cos and sin hold 4"):
        rope(q, q, cos, cos)
    with pytest.raises(ValueError, match="max_seq_len, 4"):
        rope(q, q, cos[:, :3], cos[:, :3])
    with pytest.raises(ValueError, match="positions"):
        rope(q, q, cos, cos, torch.zeros(5, dtype=torch.long, device=device))
    with pytest.raises(ValueError, match="even Dh"):
        rope(q[..., :7], q[..., :7], cos, cos)

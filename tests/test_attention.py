"""Attention against a float64 brute force, in rows and packed, and the choice of a backend against what is installed."""

from __future__ import annotations

import itertools
import sys
import types
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastlm import attention as module
from fastlm.attention import attention, choose


def brute_force(q: Tensor, k: Tensor, v: Tensor, document: Tensor, prompt: Tensor | None = None) -> Tensor:
    """Every pair of tokens in float64: q (B, T, H, D), document (B*T,) names each token's document.

    prompt (B*T,): the document whose tokens each token sees beside its own document's (-1: none).
    """
    b, t, heads, d = q.shape
    n = b * t
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.double().reshape(n, heads, d).transpose(0, 1) for x in (q, k, v))
    order = torch.arange(n)
    same = document[None] == document[:, None]
    if prompt is not None:
        same |= document[None] == prompt[:, None]
    allowed = (order[None] <= order[:, None]) & same
    scores = (q @ k.mT / d**0.5).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(b, t, heads, d)


def inputs(b: int, t: int, heads: int, kv_heads: int, d: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t)
    shapes = [(b, t, heads, d), (b, t, kv_heads, d), (b, t, kv_heads, d)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def documents(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """cu_seqlens and each token's document."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return ends, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def tree() -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """32 tokens: a prompt of 5 with answers of 4 and 7, one of 1 with 2 and 3, a document of 6, padding of 4.

    cu_seqlens, sharing, and for brute_force() each token's document and its prompt. The last boundary is repeated and the
    keys end in -1, as in batches.
    """
    lengths, prompts = [5, 4, 7, 1, 2, 3, 6, 4], [-1, 0, 0, -1, 3, 3, -1, -1]
    cu_seqlens, document = documents(lengths)
    spans = [list(range(a, b)) for a, b in pairwise(cu_seqlens.tolist())]
    seen = [(spans[p] if p >= 0 else []) + own for own, p in zip(spans, prompts, strict=True)]
    cu_seqlens_k = documents([*map(len, seen), 0, 0])[0]
    keys = torch.tensor([*itertools.chain(*seen), -1, -1, -1])
    cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(2)])
    return cu_seqlens, (cu_seqlens_k, keys), document, torch.tensor(prompts)[document]


PACKED = {
    "one document a row": (2, 8, [8, 8]),
    "single tokens": (1, 5, [1, 1, 1, 1, 1]),
    "uneven, with an empty one": (2, 11, [3, 0, 8, 10, 1]),
    "long and short": (1, 70, [64, 5, 1]),
}


@pytest.fixture(params=["native", "pytorch"])
def cpu_path(request, monkeypatch):
    """The native kernel, and what stands in for it where it is not built."""
    if request.param == "pytorch":
        monkeypatch.setattr(module.cpu, "available", lambda *tensors: False)
    elif not module.cpu.available(torch.ones(1)):
        pytest.skip("the native module is not built (make native)")


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_rows_equal_brute_force_with_every_gradient(heads, kv_heads, length):
    q, k, v = inputs(2, length, heads, kv_heads)
    check_against_brute_force(q, k, v, None, torch.arange(2).repeat_interleave(length))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_equal_brute_force_with_every_gradient(name, heads, kv_heads):
    b, t, lengths = PACKED[name]
    cu_seqlens, document = documents(lengths)
    check_against_brute_force(*inputs(b, t, heads, kv_heads), cu_seqlens, document)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("rows", [1, 2])
def test_answers_that_share_a_prompt_equal_brute_force_with_every_gradient(rows, heads, kv_heads):
    cu_seqlens, sharing, document, prompt = tree()
    check_against_brute_force(*inputs(rows, 32 // rows, heads, kv_heads), cu_seqlens, document, sharing, prompt)


def check_against_brute_force(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, document: Tensor,
    sharing: tuple[Tensor, Tensor] | None = None, prompt: Tensor | None = None,
) -> None:  # fmt: skip
    longest = None if cu_seqlens is None else int((sharing[0] if sharing else cu_seqlens).diff().max())
    out = attention(q, k, v, cu_seqlens, longest, sharing)
    expected = brute_force(q, k, v, document, prompt)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    wanted = torch.autograd.grad(expected, (q, k, v), upstream.double())
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


def test_packed_operator_passes_opcheck():
    q, k, v = (x[0] for x in inputs(1, 9, 4, 2))
    torch.library.opcheck(module.packed_documents, (q, k, v, documents([4, 5])[0], documents([4, 5])[0]))
    q, k, v = (x[0] for x in inputs(1, 9, 4, 2))
    torch.library.opcheck(module.packed_documents, (q[:5], k, v, documents([2, 3])[0], documents([2, 7])[0]))


@pytest.mark.parametrize("queries", [13, 4, 1])
def test_the_formula_for_other_devices_equals_the_cpu_operator(queries):
    """Where neither a fused kernel nor PyTorch's CPU operator takes the tensors, the written-out formula runs."""
    q, k, v = (x.detach().transpose(1, 2) for x in inputs(1, 13, 4, 4))
    q = q[:, :, 13 - queries :]
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    fast, fast_lse = module.forward_one(q, k, v)
    fast_grads = module.backward_one([dout, q, k, v, fast], fast_lse)
    written, written_lse = module.forward_by_formula(q, k, v)
    written_grads = module.backward_by_formula([dout, q, k, v, written], written_lse)
    for a, b in zip((fast, fast_lse, *fast_grads), (written, written_lse, *written_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Recorder(types.ModuleType):
    """Stands in for a package that needs a GPU: notes each call and answers with PyTorch's own attention."""

    def __init__(self, name: str, calls: list):
        super().__init__(name)
        self.calls = calls


def fake_flash(calls: list) -> types.ModuleType:
    flash = Recorder("flash_attn", calls)

    # the published signatures, flash-attn 2
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **rest):
        calls.append(("rows", causal))
        return module.torch_rows(q, k, v)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, **rest
    ):
        calls.append(("packed", causal, max_seqlen_q, max_seqlen_k, cu_seqlens_q is cu_seqlens_k))
        return module.packed_documents(q, k, v, cu_seqlens_q, cu_seqlens_k)[0]

    flash.flash_attn_func, flash.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return flash


def test_flash_attn_is_called_as_published(monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash(calls))
    q, k, v = inputs(2, 8, 4, 2)
    cu_seqlens, document = documents([3, 5, 8])
    rows = attention(q, k, v, backend="flash")
    packed = attention(q, k, v, cu_seqlens, 8, backend="flash")
    check_sharing(q, k, v, "flash")
    assert calls == [("rows", True), ("packed", True, 8, 8, True), ("packed", True, 32, 32, False)]
    torch.testing.assert_close(rows.double(), brute_force(q, k, v, torch.arange(2).repeat_interleave(8)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed.double(), brute_force(q, k, v, document), rtol=1e-5, atol=1e-6)


def check_sharing(q: Tensor, k: Tensor, v: Tensor, backend: str) -> None:
    cu_seqlens, sharing, document, prompt = tree()
    q, k, v = inputs(2, 16, 4, 2)
    shared = attention(q, k, v, cu_seqlens, 32, sharing, backend=backend)
    torch.testing.assert_close(shared.double(), brute_force(q, k, v, document, prompt), rtol=1e-5, atol=1e-6)


def test_xformers_is_called_as_published(monkeypatch):
    class BlockDiagonalCausalFromBottomRightMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert all(a <= b for a, b in zip(q_seqlen, kv_seqlen, strict=True)), "as the real one demands"
            mask = cls()
            mask.lengths, mask.key_lengths = list(q_seqlen), list(kv_seqlen)
            return mask

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert query.shape[2:] == key.shape[2:] == value.shape[2:], "4-D inputs have as many key heads as query heads"
        if isinstance(attn_bias, LowerTriangularMask):
            return module.torch_rows(query, key, value)
        assert query.shape[0] == 1, "a block-diagonal mask goes with a batch of one"
        assert key.shape[1] == sum(attn_bias.key_lengths), "every key belongs to a segment"
        bounds = documents(attn_bias.lengths)[0], documents(attn_bias.key_lengths)[0]
        return module.packed_documents(query[0], key[0], value[0], *bounds)[0][None]

    ops, bias = Recorder("xformers.ops", []), Recorder("xformers.ops.fmha.attn_bias", [])
    ops.LowerTriangularMask, ops.memory_efficient_attention = LowerTriangularMask, memory_efficient_attention
    bias.BlockDiagonalCausalFromBottomRightMask = BlockDiagonalCausalFromBottomRightMask
    names = {"xformers": Recorder("xformers", []), "xformers.ops": ops, "xformers.ops.fmha": Recorder("xformers.ops.fmha", [])}
    for name, fake in (names | {"xformers.ops.fmha.attn_bias": bias}).items():
        monkeypatch.setitem(sys.modules, name, fake)
    q, k, v = inputs(2, 8, 4, 2)
    cu_seqlens, document = documents([3, 5, 8])
    rows = attention(q, k, v, backend="xformers")
    packed = attention(q, k, v, cu_seqlens, 8, backend="xformers")
    check_sharing(q, k, v, "xformers")
    torch.testing.assert_close(rows.double(), brute_force(q, k, v, torch.arange(2).repeat_interleave(8)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed.double(), brute_force(q, k, v, document), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "dtype", "present", "expected"),
    [
        ("cpu", torch.float32, {"flash_attn", "xformers"}, "torch"),
        ("cuda", torch.float32, {"flash_attn", "xformers"}, "torch"),
        ("cuda", torch.bfloat16, {"flash_attn", "xformers"}, "flash"),
        ("cuda", torch.float16, {"xformers"}, "xformers"),
        ("cuda", torch.bfloat16, set(), "torch"),
    ],
)
def test_auto_takes_the_fastest_backend_that_can_serve(monkeypatch, device, dtype, present, expected):
    monkeypatch.setattr(module, "installed", present.__contains__)
    name, why = choose(device, dtype)
    assert name == expected
    assert why


def test_unknown_backend_and_missing_length_are_named():
    q, k, v = inputs(1, 4, 2, 2)
    with pytest.raises(ValueError, match="unknown attention backend 'flsh'"):
        attention(q, k, v, backend="flsh")
    with pytest.raises(ValueError, match="cu_seqlens needs max_seqlen"):
        attention(q, k, v, documents([4])[0])


@pytest.mark.slow
def test_packed_attention_compiles_in_one_graph_with_gradients():
    q, k, v = inputs(1, 12, 4, 2)
    cu_seqlens, _ = documents([5, 7])
    sharing = documents([5, 10])[0], torch.tensor([*range(5), 0, 1, 2, *range(5, 12), -1])

    def step(q, k, v, cu_seqlens):
        plain, shared = attention(q, k, v, cu_seqlens, 12), attention(q, k, v, cu_seqlens, 12, sharing)
        return (plain.square() + shared.sin()).sum()

    expected = torch.autograd.grad(step(q, k, v, cu_seqlens), (q, k, v))
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(q, k, v, cu_seqlens), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)

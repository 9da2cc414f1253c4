"""Attention against a float64 brute force, in rows and packed, whichever backend computes it."""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.attention import PACKED as PACKED_BACKENDS
from fastlm.kernels.attention import Documents, attention, pick, prepare, torch_rows, torch_varlen
from fastlm.kernels.packed_documents import packed_documents


def brute_force(
    q: Tensor, k: Tensor, v: Tensor, document: Tensor, prompt: Tensor | None = None
) -> Tensor:
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


def inputs(
    b: int, t: int, heads: int, kv_heads: int, d: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t)
    shapes = [(b, t, heads, d), (b, t, kv_heads, d), (b, t, kv_heads, d)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def documents(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """cu_seqlens and each token's document."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return ends, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def tree() -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """32 tokens: a prompt of 5 with answers of 4 and 7, one of 1 with 2 and 3, a document of 6,
    padding of 4.

    cu_seqlens, sharing, and for brute_force() each token's document and its prompt. The last
    boundary is repeated and there are more keys than are seen, as in batches.
    """
    lengths, prompts = [5, 4, 7, 1, 2, 3, 6, 4], [-1, 0, 0, -1, 3, 3, -1, -1]
    cu_seqlens, document = documents(lengths)
    spans = [list(range(a, b)) for a, b in pairwise(cu_seqlens.tolist())]
    seen = [(spans[p] if p >= 0 else []) + own for own, p in zip(spans, prompts, strict=True)]
    cu_seqlens_k = documents([*map(len, seen), 0, 0])[0]
    keys = [*itertools.chain(*seen), 0, 0, 0]
    cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(2)])
    sharing = cu_seqlens_k, torch.tensor(keys), places_of(keys, len(document), 3)
    return cu_seqlens, sharing, document, torch.tensor(prompts)[document]


def places_of(keys: list[int], tokens: int, unseen: int) -> Tensor:
    """Where each token stands among the keys but the last, (tokens, most); else at the last."""
    seen = keys[: len(keys) - unseen]
    found = [[place for place, key in enumerate(seen) if key == token] for token in range(tokens)]
    most = max(map(len, found))
    nowhere = [len(keys) - 1]
    return torch.tensor([places + nowhere * (most - len(places)) for places in found])


PACKED = {
    "one document a row": (2, 8, [8, 8]),
    "single tokens": (1, 5, [1, 1, 1, 1, 1]),
    "uneven, with an empty one": (2, 11, [3, 0, 8, 10, 1]),
    "long and short": (1, 70, [64, 5, 1]),
}


@pytest.fixture(params=["native", "pytorch", "masked"])
def backend(request, monkeypatch) -> str:
    """The native kernel, what stands in for it where it is not built, and SDPA with a mask."""
    if request.param == "pytorch":
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    elif request.param == "native" and not native.available(torch.ones(1)):
        pytest.skip("the native module is not built (make native)")
    return "masked" if request.param == "masked" else "torch"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_rows_equal_brute_force_with_every_gradient(heads, kv_heads, length, backend):
    q, k, v = inputs(2, length, heads, kv_heads)
    check_against_brute_force(q, k, v, None, torch.arange(2).repeat_interleave(length), backend)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_equal_brute_force_with_every_gradient(name, heads, kv_heads, backend):
    b, t, lengths = PACKED[name]
    cu_seqlens, document = documents(lengths)
    packed = Documents(cu_seqlens, max(lengths))
    check_against_brute_force(*inputs(b, t, heads, kv_heads), packed, document, backend)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("rows", [1, 2])
def test_answers_that_share_a_prompt_equal_brute_force_with_every_gradient(
    rows, heads, kv_heads, backend
):
    cu_seqlens, sharing, document, prompt = tree()
    packed = Documents(cu_seqlens, 12, sharing)
    q, k, v = inputs(rows, 32 // rows, heads, kv_heads)
    check_against_brute_force(q, k, v, packed, document, backend, prompt)


def check_against_brute_force(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Documents | None,
    document: Tensor,
    backend: str,
    prompt: Tensor | None = None,
) -> None:
    out = attention(q, k, v, packed and prepare(packed, q, backend), backend)
    expected = brute_force(q, k, v, document, prompt)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    wanted = torch.autograd.grad(expected, (q, k, v), upstream.double())
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


def test_picked_keys_pass_their_gradients_back_and_nothing_of_those_that_nobody_sees():
    """A kernel may leave anything in the gradient of a key beyond the last boundary."""
    _, (cu_seqlens_k, keys, places), _, _ = tree()
    x = torch.randn(32, 2, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(keys), 2, 4, dtype=torch.float64)
    upstream[cu_seqlens_k[-1] :] = torch.nan
    picked = pick(x, keys, places)
    assert torch.equal(picked, x[keys])
    (found,) = torch.autograd.grad(picked, x, upstream)
    seen = int(cu_seqlens_k[-1])
    expected = torch.zeros_like(x).index_add(0, keys[:seen], upstream[:seen])
    torch.testing.assert_close(found, expected)


def test_packed_operator_passes_opcheck():
    q, k, v = (x[0] for x in inputs(1, 9, 4, 2))
    torch.library.opcheck(packed_documents, (q, k, v, documents([4, 5])[0], documents([4, 5])[0]))
    q, k, v = (x[0] for x in inputs(1, 9, 4, 2))
    torch.library.opcheck(
        packed_documents, (q[:5], k, v, documents([2, 3])[0], documents([2, 7])[0])
    )


def test_the_operator_that_comes_with_pytorch_is_called_as_published(monkeypatch):
    """varlen_attn runs on a GPU only; what it is asked for is the same on any device."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)
    calls: list = []

    def varlen_attn(*args, **options):
        asked = signature.bind(*args, **options).arguments
        calls.append(
            {name: asked.get(name) for name in ("max_q", "max_k", "window_size", "enable_gqa")}
        )
        return packed_documents(*args[:5])[0]

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setitem(PACKED_BACKENDS, "torch", torch_varlen)
    q, k, v = inputs(2, 8, 4, 2)
    cu_seqlens, document = documents([3, 5, 8])
    packed = attention(q, k, v, Documents(cu_seqlens, 8))
    check_sharing("torch")
    grouped = True if "enable_gqa" in signature.parameters else None
    causal = {"window_size": (-1, 0), "enable_gqa": grouped}
    assert calls == [{"max_q": 8, "max_k": 8} | causal, {"max_q": 32, "max_k": 32} | causal]
    torch.testing.assert_close(
        packed.double(), brute_force(q, k, v, document), rtol=1e-5, atol=1e-6
    )


class Recorder(types.ModuleType):
    """Stands in for a package that needs a GPU.

    Notes each call and answers with PyTorch's own attention.
    """

    def __init__(self, name: str, calls: list):
        super().__init__(name)
        self.calls = calls


def fake_flash(calls: list) -> types.ModuleType:
    flash = Recorder("flash_attn", calls)

    # the published signatures, flash-attn 2
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **rest
    ):
        calls.append(("rows", causal))
        return torch_rows(q, k, v)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        **rest,
    ):
        calls.append(("packed", causal, max_seqlen_q, max_seqlen_k, cu_seqlens_q is cu_seqlens_k))
        return packed_documents(q, k, v, cu_seqlens_q, cu_seqlens_k)[0]

    flash.flash_attn_func, flash.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return flash


def test_flash_attn_is_called_as_published(monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash(calls))
    q, k, v = inputs(2, 8, 4, 2)
    cu_seqlens, document = documents([3, 5, 8])
    rows = attention(q, k, v, backend="flash")
    packed = attention(q, k, v, Documents(cu_seqlens, 8), backend="flash")
    check_sharing("flash")
    assert calls == [("rows", True), ("packed", True, 8, 8, True), ("packed", True, 32, 32, False)]
    torch.testing.assert_close(
        rows.double(),
        brute_force(q, k, v, torch.arange(2).repeat_interleave(8)),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(
        packed.double(), brute_force(q, k, v, document), rtol=1e-5, atol=1e-6
    )


def check_sharing(backend: str) -> None:
    cu_seqlens, sharing, document, prompt = tree()
    q, k, v = inputs(2, 16, 4, 2)
    shared = attention(q, k, v, Documents(cu_seqlens, 32, sharing), backend=backend)
    torch.testing.assert_close(
        shared.double(), brute_force(q, k, v, document, prompt), rtol=1e-5, atol=1e-6
    )


def test_xformers_is_called_as_published(monkeypatch):
    class BlockDiagonalCausalFromBottomRightMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert all(a <= b for a, b in zip(q_seqlen, kv_seqlen, strict=True)), (
                "as the real one demands"
            )
            mask = cls()
            mask.lengths, mask.key_lengths = list(q_seqlen), list(kv_seqlen)
            return mask

    class LowerTriangularMask:
        pass

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        assert query.shape[2:] == key.shape[2:] == value.shape[2:], (
            "4-D inputs have as many key heads as query heads"
        )
        if isinstance(attn_bias, LowerTriangularMask):
            return torch_rows(query, key, value)
        assert query.shape[0] == 1, "a block-diagonal mask goes with a batch of one"
        assert key.shape[1] == sum(attn_bias.key_lengths), "every key belongs to a segment"
        bounds = documents(attn_bias.lengths)[0], documents(attn_bias.key_lengths)[0]
        return packed_documents(query[0], key[0], value[0], *bounds)[0][None]

    ops, bias = Recorder("xformers.ops", []), Recorder("xformers.ops.fmha.attn_bias", [])
    ops.LowerTriangularMask, ops.memory_efficient_attention = (
        LowerTriangularMask,
        memory_efficient_attention,
    )
    bias.BlockDiagonalCausalFromBottomRightMask = BlockDiagonalCausalFromBottomRightMask
    names = {
        "xformers": Recorder("xformers", []),
        "xformers.ops": ops,
        "xformers.ops.fmha": Recorder("xformers.ops.fmha", []),
    }
    for name, fake in (names | {"xformers.ops.fmha.attn_bias": bias}).items():
        monkeypatch.setitem(sys.modules, name, fake)
    q, k, v = inputs(2, 8, 4, 2)
    cu_seqlens, document = documents([3, 5, 8])
    rows = attention(q, k, v, backend="xformers")
    packed = attention(q, k, v, Documents(cu_seqlens, 8), backend="xformers")
    check_sharing("xformers")
    torch.testing.assert_close(
        rows.double(),
        brute_force(q, k, v, torch.arange(2).repeat_interleave(8)),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(
        packed.double(), brute_force(q, k, v, document), rtol=1e-5, atol=1e-6
    )


def test_an_unknown_backend_is_named():
    q, k, v = inputs(1, 4, 2, 2)
    with pytest.raises(ValueError, match="unknown attention backend 'flsh'"):
        attention(q, k, v, backend="flsh")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "masked"])
def test_packed_attention_compiles_in_one_graph_with_gradients(backend):
    q, k, v = inputs(1, 12, 4, 2)
    cu_seqlens, _ = documents([5, 7])
    keys = [*range(5), 0, 1, 2, 3, 4, *range(5, 12), 0]
    sharing = documents([5, 12])[0], torch.tensor(keys), places_of(keys, 12, 1)

    def step(q, k, v, cu_seqlens):
        plain = prepare(Documents(cu_seqlens, 12), q, backend)
        shared = prepare(Documents(cu_seqlens, 12, sharing), q, backend)
        return (
            attention(q, k, v, plain, backend).square() + attention(q, k, v, shared, backend).sin()
        ).sum()

    expected = torch.autograd.grad(step(q, k, v, cu_seqlens), (q, k, v))
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(q, k, v, cu_seqlens), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)

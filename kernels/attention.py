"""Causal attention: one function for plain rows and for packed documents, its backends behind it.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j

over the tokens j <= i of i's row and, where documents are packed, of i's document or of the part
that it shares with others. Query head h reads key/value head h // (H / Hkv) (grouped-query
attention). Which backend runs is decided before a run starts, in fastlm/attention_backend.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlm.kernels import cpu
from fastlm.kernels.common import cpu_kernel

BACKENDS = ("torch", "masked", "flash", "xformers")
HALF = (torch.float16, torch.bfloat16)
# varlen_attn of torch 2.11 takes grouped heads as they are; later ones want to be told
GROUPED: dict[str, Any] = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}


class Documents(NamedTuple):
    """Where the documents lie in the B*T tokens of packed rows, laid end to end.

    cu_seqlens: int32 (documents + 1,), their boundaries, from 0 to B*T; the end of a row is always
    one, and the last may be repeated. max_seqlen: an upper bound of their lengths, tokens.

    sharing: None, or where a document sees more than itself, three tensors. cu_seqlens_k: int32
    (documents + 1,), keys: int64 (n,): document i sees tokens keys[cu_seqlens_k[i] :
    cu_seqlens_k[i + 1]], which are those of at most one earlier document and then its own; the
    last key is seen by none. places: int64 (B*T, most), where each token stands in keys, for what
    the backward pass adds up; n - 1 where it stands less often.

    mask: None, or (B, 1, T, T), 0 where a token sees another and -inf elsewhere, from prepare().
    """

    cu_seqlens: Tensor
    max_seqlen: int
    sharing: tuple[Tensor, Tensor, Tensor] | None = None
    mask: Tensor | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    backend: str = "torch",
) -> Tensor:
    """Causal attention, in plain rows or, with documents from prepare(), within packed documents.

    q: (B, T, H, Dh); k, v: (B, T, Hkv, Dh). backend: one of BACKENDS. Returns (B, T, H, Dh).

    Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        expected = ", ".join(BACKENDS)
        raise ValueError(f"unknown attention backend {backend!r}; choose among {expected}")
    if documents is None:
        rows: dict[str, Callable[..., Tensor]] = {
            "torch": torch_rows,
            "masked": sdpa,
            "flash": flash_rows,
            "xformers": xformers_rows,
        }
        return rows[backend](q, k, v)
    if takes_mask(q, backend):
        assert documents.mask is not None, "prepare() makes the mask, once for all layers"
        return sdpa(q, k, v, documents.mask)
    packed: dict[str, Callable[..., Tensor]] = {
        "torch": torch_packed,
        "flash": flash_packed,
        "xformers": xformers_packed,
    }
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))  # (B*T, heads, Dh)
    cu_seqlens_k = documents.cu_seqlens
    if documents.sharing is not None:
        cu_seqlens_k, keys, places = documents.sharing
        flat_k = pick(flat_k, keys, places)
        flat_v = pick(flat_v, keys, places)
    out = packed[backend](
        flat_q,
        flat_k,
        flat_v,
        documents.cu_seqlens,
        cu_seqlens_k,
        documents.max_seqlen,
    )
    return out.reshape(q.shape)


def takes_mask(x: Tensor, backend: str) -> bool:
    """Whether packed documents of x's device and dtype are kept apart by a mask.

    The kernels for packed documents need fp16 or bf16 (and a GPU that has them: backend "masked").
    """
    on_gpu = x.device.type == "cuda"
    return backend == "masked" or (backend == "torch" and on_gpu and x.dtype not in HALF)


def prepare(documents: Documents, x: Tensor, backend: str) -> Documents:
    """The documents with what the backend needs of them; x (B, T, ...) has the dtype of q.

    Done once a batch, before the first layer.
    """
    if not takes_mask(x, backend):
        return documents
    return documents._replace(mask=document_mask(documents, x.shape[0], x.shape[1], x.dtype))


def document_mask(documents: Documents, rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """(rows, 1, length, length): 0 where a token (third axis) sees another, -inf elsewhere."""
    device = documents.cu_seqlens.device
    token = torch.arange(rows * length, dtype=torch.int32, device=device)
    own = torch.searchsorted(documents.cu_seqlens, token, right=True)  # its document, from 1 on
    other = own  # the document of the first token that it sees
    if documents.sharing is not None:
        cu_seqlens_k, keys, _ = documents.sharing
        other = own[keys[cu_seqlens_k[own - 1]]]
    own = own.view(rows, length)
    other = other.view(rows, length)
    seen = (own[:, :, None] == own[:, None, :]) | (other[:, :, None] == own[:, None, :])
    seen = seen & torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return torch.where(seen, 0.0, -torch.inf).to(dtype).unsqueeze(1)


class _Pick(torch.autograd.Function):
    """x[keys]. Its backward pass adds up each token's places: no sort, no atomic addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x[keys]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        nowhere = dy.shape[0] - 1
        dx = F.embedding_bag(places, dy.flatten(1), mode="sum", padding_idx=nowhere)
        return dx.unflatten(1, dy.shape[1:]), None, None


def pick(x: Tensor, keys: Tensor, places: Tensor) -> Tensor:
    """x[keys] for x (N, H, Dh); keys and places as in Documents.sharing."""
    return _Pick.apply(x, keys, places)


def flash_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


# In each *_packed: q (N, H, Dh) in segments cu_q, k and v (M, Hkv, Dh) in as many segments cu_k;
# the last query of a segment sees its last key, the one before it one key less, and so on.


def flash_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_seqlen, max_seqlen, causal=True)


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """(..., Hkv, Dh) -> (..., heads, Dh), a key/value head for each of its query heads."""
    groups = heads // x.shape[-2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=-2)


def xformers_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    k = repeat_kv(k, q.shape[-2])
    v = repeat_kv(v, q.shape[-2])
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask())


def xformers_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    lengths_q = cu_q.diff().tolist()  # waits for the GPU, here and in the next line
    lengths_k = cu_k.diff().tolist()
    bias = BlockDiagonalCausalFromBottomRightMask.from_seqlens(lengths_q, lengths_k)
    k = repeat_kv(k[: sum(lengths_k)], q.shape[-2])
    v = repeat_kv(v[: sum(lengths_k)], q.shape[-2])
    q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    return memory_efficient_attention(q, k, v, attn_bias=bias).squeeze(0)


def torch_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "cpu" and cpu.available(q, k, v):  # each row a document
        rows, tokens = q.shape[:2]
        ends = torch.arange(0, rows * tokens + 1, max(tokens, 1), dtype=torch.int32)
        flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
        return packed_documents(flat_q, flat_k, flat_v, ends, ends)[0].view(q.shape)
    if q.device.type == "cuda" and q.dtype not in HALF:
        return sdpa(q, k, v)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, Dh)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's attention with grouped keys and values repeated.

    Its memory-efficient kernel, which takes fp32, masks and old GPUs, knows no groups in torch
    2.11: there, SDPA would fall back on whole matrices of scores.
    """
    k = repeat_kv(k, q.shape[2])
    v = repeat_kv(v, q.shape[2])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, Dh)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2)


def torch_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
) -> Tensor:
    if q.device.type == "cuda":
        return varlen(q, k, v, cu_q, cu_k, max_seqlen)
    return packed_documents(q, k, v, cu_q, cu_k)[0]


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
) -> Tensor:
    """The FlashAttention that comes with PyTorch, or the one put in its place there."""
    from torch.nn.attention.varlen import varlen_attn

    causal = (-1, 0)  # the last query of a document sees its last key
    out = varlen_attn(q, k, v, cu_q, cu_k, max_seqlen, max_seqlen, window_size=causal, **GROUPED)
    assert isinstance(out, Tensor)
    return out


# Packed documents on a CPU as one opaque operator, so that torch.compile sees static shapes
# however the documents fall: the native kernel, or else PyTorch's operator, document by document.
# The native one also takes plain rows: at 8 x 256 tokens it needs half the time of PyTorch's (2
# cores, AVX2).


def spans(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    """The queries and the keys of each segment that has any queries."""
    both = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    return [(slice(*of_q), slice(*of_k)) for of_q, of_k in both if of_q[1] > of_q[0]]


def document(x: Tensor, span: slice, heads: int) -> Tensor:
    """Those tokens of (N, heads', Dh) as (1, heads, n, Dh)."""
    return repeat_kv(x[span], heads).transpose(0, 1).unsqueeze(0)


@torch.library.custom_op("fastlm::packed_documents", mutates_args=())
def packed_documents(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    """Attention within each segment, on a CPU.

    q: (N, H, Dh), k, v: (M, Hkv, Dh); returns out (N, H, Dh) and the log-sum-exp (N, H) in fp32.
    """
    assert q.device.type == "cpu", "a GPU has kernels for packed documents, or a mask"
    if cpu.available(q, k, v):
        return cpu.attention(q, k, v, cu_q, cu_k)
    n, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(n, heads, dtype=torch.float32)
    for mine, seen in spans(cu_q, cu_k):
        one_q = document(q, mine, heads)
        one_k = document(k, seen, heads)
        one_v = document(v, seen, heads)
        one_out, one_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            one_q, one_k, one_v, 0.0, **causal_options(one_q, one_k)
        )
        out[mine] = one_out[0].transpose(0, 1)
        lse[mine] = one_lse[0].transpose(0, 1)
    return out, lse


def causal_options(q: Tensor, k: Tensor) -> dict[str, Any]:
    """PyTorch's causal flag lets the first query see the first key only.

    More keys than queries need a mask of their own: the last query sees them all.
    """
    queries = q.shape[-2]
    keys = k.shape[-2]
    if queries == keys:
        return {"is_causal": True}
    future = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
    return {"attn_mask": torch.zeros((), dtype=q.dtype).masked_fill(future, -torch.inf)}


@packed_documents.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("fastlm::packed_documents_backward", mutates_args=())
def packed_documents_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if cpu.available(dout, q, k, v):
        return cpu.attention_backward(dout, q, k, v, out, lse, cu_q, cu_k)
    heads = q.shape[1]
    groups = (k.shape[1], heads // k.shape[1])
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
    for mine, seen in spans(cu_q, cu_k):
        one_dout, one_q, one_out = (document(t, mine, heads) for t in (dout, q, out))
        one_k, one_v = (document(t, seen, heads) for t in (k, v))
        one_lse = lse[mine].T.unsqueeze(0).contiguous()
        options = {"is_causal": False} | causal_options(one_q, one_k)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(one_dout, one_q, one_k, one_v, one_out, one_lse, 0.0, **options)
        one_dq, one_dk, one_dv = grads
        dq[mine] = one_dq[0].transpose(0, 1)
        # a group of query heads adds up in its key/value head
        dk[seen] = one_dk[0].unflatten(0, groups).sum(1).transpose(0, 1)
        dv[seen] = one_dv[0].unflatten(0, groups).sum(1).transpose(0, 1)
    return dq, dk, dv


@packed_documents_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*packed_documents_backward(dout, *ctx.saved_tensors), None, None)


cpu_kernel(packed_documents)
cpu_kernel(packed_documents_backward)
packed_documents.register_autograd(_backward, setup_context=_save)

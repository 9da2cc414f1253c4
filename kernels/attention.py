"""Causal attention: one function for plain rows and for packed documents, its backends behind it.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j

over the tokens j <= i of i's row and, where documents are packed, of i's document or of the part
that it shares with others. Query head h reads key/value head h // (H / Hkv) (grouped-query
attention). Which backend runs is decided before a run starts, in fastlm/attention_backend.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlm.kernels import native
from fastlm.kernels.packed_documents import packed_documents, repeat_kv

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

    q: (B, T, H, Dh); k, v: (B, T, Hkv, Dh). backend: one of ROWS. Returns (B, T, H, Dh).

    Raises ValueError for an unknown backend.
    """
    if backend not in ROWS:
        expected = ", ".join(ROWS)
        raise ValueError(f"unknown attention backend {backend!r}; choose among {expected}")
    if documents is None:
        return ROWS[backend](q, k, v)
    if takes_mask(q, backend):
        assert documents.mask is not None, "prepare() makes the mask, once for all layers"
        return sdpa(q, k, v, documents.mask)
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))  # (B*T, heads, Dh)
    cu_seqlens_k = documents.cu_seqlens
    if documents.sharing is not None:
        cu_seqlens_k, keys, places = documents.sharing
        flat_k = pick(flat_k, keys, places)
        flat_v = pick(flat_v, keys, places)
    out = PACKED[backend](
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
    """PyTorch's attention; on a CPU the native kernel for packed documents, each row a document.

    At 8 x 256 tokens that needs half the time of PyTorch's (2 cores, AVX2).
    """
    if q.device.type == "cpu" and native.available(q, k, v):
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
        return torch_varlen(q, k, v, cu_q, cu_k, max_seqlen)
    return packed_documents(q, k, v, cu_q, cu_k)[0]


def torch_varlen(
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


ROWS: dict[str, Callable[..., Tensor]] = {
    "torch": torch_rows,
    "masked": sdpa,
    "flash": flash_rows,
    "xformers": xformers_rows,
}
PACKED: dict[str, Callable[..., Tensor]] = {
    "torch": torch_packed,
    "flash": flash_packed,
    "xformers": xformers_packed,
}

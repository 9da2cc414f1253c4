"""Causal attention: one function for plain rows and for packed documents, its backends behind it.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j,    j <= i and, when packed, j in the same document as i
                                                                (or in the part that i's segment shares with others)

Query head h reads key/value head h // (H / Hkv) (grouped-query attention).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.kernels import cpu, embedding
from fastlm.kernels.common import cpu_kernel

BACKENDS = ("flash", "xformers", "torch")
HALF = (torch.float16, torch.bfloat16)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    sharing: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention, in plain rows or within packed documents.

    q: (B, T, H, Dh); k, v: (B, T, Hkv, Dh). cu_seqlens: int32 (documents + 1,), the boundaries of the documents in the
    B*T tokens laid end to end, from 0 to B*T (a row's end is always a boundary); max_seqlen: an upper bound of their
    lengths, tokens. sharing: cu_seqlens_k, int32 (documents + 1,), and keys (n,) int64, where a document sees more than
    itself: document i sees the tokens keys[cu_seqlens_k[i] : cu_seqlens_k[i + 1]], its own being the last of them, and keys
    beyond the last boundary are -1. backend: one of BACKENDS or auto. Returns (B, T, H, Dh).

    Raises ValueError for an unknown backend or when cu_seqlens comes without max_seqlen.
    """
    name = choose(q.device.type, q.dtype)[0] if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose among auto, {', '.join(BACKENDS)}")
    if cu_seqlens is None:
        rows: Callable[..., Tensor] = {"flash": flash_rows, "xformers": xformers_rows, "torch": torch_rows}[name]
        return rows(q, k, v)
    if max_seqlen is None:
        raise ValueError("cu_seqlens needs max_seqlen, the length of the longest document in tokens")
    packed: Callable[..., Tensor] = {"flash": flash_packed, "xformers": xformers_packed, "torch": torch_packed}[name]
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))  # (B*T, heads, Dh)
    cu_seqlens_k = cu_seqlens
    if sharing is not None:
        cu_seqlens_k, keys = sharing
        flat_k, flat_v = pick(flat_k, keys), pick(flat_v, keys)
    return packed(flat_q, flat_k, flat_v, cu_seqlens, cu_seqlens_k, max_seqlen).view(q.shape)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for x (N, H, Dh); 0 (and no gradient) where the index is -1."""
    rows = embedding(index.clamp_min(0), x.flatten(1)).unflatten(1, x.shape[1:])
    return torch.where((index >= 0)[:, None, None], rows, 0)


@cache
def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def choose(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that auto takes for tensors of this device type and dtype, and why."""
    if device != "cuda":
        return "torch", f"flash-attn and xformers need a GPU; tensors are on {device}"
    if dtype not in HALF:
        return "torch", f"flash-attn and xformers' fast kernels need fp16 or bf16; tensors are {dtype}"
    if installed("flash_attn"):
        return "flash", "flash-attn is installed"
    if installed("xformers"):
        return "xformers", "xformers is installed (flash-attn is not)"
    return "torch", "neither flash-attn nor xformers is installed"


def flash_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


# In each *_packed: q (N, H, Dh) in segments cu_q, k and v (M, Hkv, Dh) in as many segments cu_k; the last query of a segment
# sees its last key, the one before it one key less, and so on.


def flash_packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_seqlen: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_seqlen, max_seqlen, causal=True)


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """(..., Hkv, Dh) -> (..., heads, Dh), each key/value head repeated for its group of query heads."""
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)


def xformers_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    heads = q.shape[-2]
    return memory_efficient_attention(q, repeat_kv(k, heads), repeat_kv(v, heads), attn_bias=LowerTriangularMask())


def xformers_packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_seqlen: int) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    heads = q.shape[-2]
    lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    bias = BlockDiagonalCausalFromBottomRightMask.from_seqlens(*lengths)
    k, v = k[: sum(lengths[1])], v[: sum(lengths[1])]
    q, k, v = (t.unsqueeze(0) for t in (q, repeat_kv(k, heads), repeat_kv(v, heads)))
    return memory_efficient_attention(q, k, v, attn_bias=bias).squeeze(0)


def torch_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "cpu" and cpu.available(q, k, v):  # each row a document
        rows, tokens = q.shape[:2]
        ends = torch.arange(0, rows * tokens + 1, max(tokens, 1), dtype=torch.int32)
        return packed_documents(*(t.flatten(0, 1) for t in (q, k, v)), ends, ends)[0].view(q.shape)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, Dh)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def torch_packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_seqlen: int) -> Tensor:
    if q.device.type == "cuda" and q.dtype in HALF:
        from torch.nn.attention.varlen import varlen_attn

        heads = q.shape[-2]
        out = varlen_attn(q, repeat_kv(k, heads), repeat_kv(v, heads), cu_q, cu_k, max_seqlen, max_seqlen, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out
    return packed_documents(q, k, v, cu_q, cu_k)[0]


# Packed documents where no GPU kernel takes cu_seqlens, as one opaque operator, so that torch.compile sees static shapes
# however the documents fall: the native CPU kernel, or else PyTorch's own attention, document by document. The native one
# also takes plain rows: at 8 x 256 tokens it needs half the time of PyTorch's (2 cores, AVX2).


def spans(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    """The queries and the keys of each segment that has any queries."""
    both = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    return [(slice(*of_q), slice(*of_k)) for of_q, of_k in both if of_q[1] > of_q[0]]


def document(x: Tensor, span: slice, heads: int) -> Tensor:
    """Those tokens of (N, heads', Dh) as (1, heads, n, Dh)."""
    return repeat_kv(x[span], heads).transpose(0, 1).unsqueeze(0)


@torch.library.custom_op("fastlm::packed_documents", mutates_args=())
def packed_documents(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    """Attention within each segment: q (N, H, Dh), k, v (M, Hkv, Dh) -> out (N, H, Dh), lse (N, H) in fp32."""
    if q.device.type == "cpu" and cpu.available(q, k, v):
        return cpu.attention(q, k, v, cu_q, cu_k)
    n, heads, _ = q.shape
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(n, heads, dtype=torch.float32)
    for mine, seen in spans(cu_q, cu_k):
        o, z = forward_one(*(document(t, at, heads) for t, at in ((q, mine), (k, seen), (v, seen))))
        out[mine], lse[mine] = o[0].transpose(0, 1), z[0].transpose(0, 1)
    return out, lse


def forward_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, **causal_options(q, k))
    return forward_by_formula(q, k, v)


def causal_options(q: Tensor, k: Tensor) -> dict[str, Any]:
    """PyTorch's causal flag lets the first query see the first key; more keys than queries need a mask of their own."""
    if q.shape[-2] == k.shape[-2]:
        return {"is_causal": True}
    return {"attn_mask": torch.zeros((), dtype=q.dtype).masked_fill(future(q, k), -torch.inf)}


def future(q: Tensor, k: Tensor) -> Tensor:
    """Which keys a query must not see, (Tq, Tk): the last query sees them all."""
    tq, tk = q.shape[-2], k.shape[-2]
    return torch.ones(tq, tk, dtype=torch.bool, device=q.device).triu(1 + tk - tq)


def forward_by_formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = causal_scores(q, k)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def causal_scores(q: Tensor, k: Tensor) -> Tensor:
    return ((q.float() @ k.float().mT) * q.shape[-1] ** -0.5).masked_fill(future(q, k), -torch.inf)


@packed_documents.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("fastlm::packed_documents_backward", mutates_args=())
def packed_documents_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu" and cpu.available(dout, q, k, v):
        return cpu.attention_backward(dout, q, k, v, out, lse, cu_q, cu_k)
    heads, kv_heads = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    for mine, seen in spans(cu_q, cu_k):
        parts = ((dout, mine), (q, mine), (k, seen), (v, seen), (out, mine))
        gq, gk, gv = backward_one([document(t, at, heads) for t, at in parts], lse[mine].T.unsqueeze(0))
        dq[mine] = gq[0].transpose(0, 1)
        for grad, g in ((dk, gk), (dv, gv)):  # a group of query heads adds up in its key/value head
            grad[seen] = g[0].unflatten(0, (kv_heads, heads // kv_heads)).sum(1).transpose(0, 1)
    return dq, dk, dv


def backward_one(tensors: list[Tensor], lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = tensors
    if q.device.type == "cpu":
        options = {"is_causal": False} | causal_options(q, k)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse.contiguous(), 0.0, **options
        )
    return backward_by_formula(tensors, lse)


def backward_by_formula(tensors: list[Tensor], lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = tensors
    p = (causal_scores(q, k) - lse.unsqueeze(-1)).exp()
    dout = dout.float()
    ds = p * (dout @ v.float().mT - (dout * out.float()).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return (ds @ k.float()).to(q.dtype), (ds.mT @ q.float()).to(k.dtype), (p.mT @ dout).to(v.dtype)


@packed_documents_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, *rest = ctx.saved_tensors
    return (*packed_documents_backward(dout, q, k, v, *rest), None, None)


cpu_kernel(packed_documents)
cpu_kernel(packed_documents_backward)
packed_documents.register_autograd(_backward, setup_context=_save)

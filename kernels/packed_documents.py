"""Causal attention within packed documents on a CPU, as one opaque operator.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(head_dim)) v_j
    lse_i = log sum_j exp(q_i . k_j / sqrt(head_dim))

over the keys j that query i sees: the last query of segment s, cu_q[s + 1] - 1, sees all of the
segment's keys, cu_k[s] to cu_k[s + 1]; the one before it one key less, and so on.

q: (N, H, Dh); k, v: (M, Hkv, Dh); cu_q, cu_k: (segments + 1,) int32. out: (N, H, Dh) in q's dtype,
lse: (N, H) in fp32, saved for the backward with the inputs. The native kernel computes it, or else
PyTorch's operator, document by document. As an operator of its own it shows torch.compile static
shapes however the documents fall.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels import native
from fastlm.kernels.common import call_directly_on_cpu


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """(..., Hkv, Dh) -> (..., heads, Dh), a key/value head for each of its query heads."""
    groups = heads // x.shape[-2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=-2)


def spans(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    """The queries and the keys of each segment that has any queries."""
    both = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    return [(slice(*of_q), slice(*of_k)) for of_q, of_k in both if of_q[1] > of_q[0]]


def document(x: Tensor, span: slice, heads: int) -> Tensor:
    """Those tokens of (N, heads', Dh) as (1, heads, n, Dh)."""
    return repeat_kv(x[span], heads).transpose(0, 1).unsqueeze(0)


@torch.library.custom_op("fastlm::packed_documents", mutates_args=())
def packed_documents(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention within each segment, on a CPU.

    q: (N, H, Dh), k, v: (M, Hkv, Dh); returns out (N, H, Dh) and the log-sum-exp (N, H) in fp32.
    """
    assert q.device.type == "cpu", "a GPU has kernels for packed documents, or a mask"
    if native.available(q, k, v):
        return native.attention(q, k, v, cu_q, cu_k)
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
    if native.available(dout, q, k, v):
        return native.attention_backward(dout, q, k, v, out, lse, cu_q, cu_k)
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


call_directly_on_cpu(packed_documents)
call_directly_on_cpu(packed_documents_backward)
packed_documents.register_autograd(_backward, setup_context=_save)

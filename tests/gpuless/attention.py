"""What attention asks of PyTorch on a GPU: the operators, their shapes, no wait, no score matrix.

    fakegpu PYTHON tests/gpuless/attention.py

Runs on the stand-in GPU, where everything but the values is PyTorch's own. Prints a line for each
property and ends with 1 where one does not hold.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.attention.varlen  # registers the operator
from torch import Tensor
from torch._subclasses import FakeTensorMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fastlm.attention_backend import choose  # noqa: E402
from fastlm.config import PRESETS  # noqa: E402
from fastlm.kernels.attention import HALF, Documents, attention, prepare, torch_varlen  # noqa: E402

GPU = torch.device("cuda")
ROWS, LENGTH, HEADS, DIM = 4, 256, 8, 64
MODEL = replace(PRESETS["tiny"], dim=HEADS * DIM, n_heads=HEADS, n_kv_heads=2)


def inputs(kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v on the GPU, with gradients."""
    shapes = [(ROWS, LENGTH, heads, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.zeros(s, dtype=dtype, device=GPU, requires_grad=True) for s in shapes]


def documents(n: int = 20) -> Documents:
    """Three documents a row, and boundaries that repeat their last."""
    ends = [row * LENGTH + at for row in range(ROWS) for at in (100, 101, LENGTH)]
    bounds = [0, *ends] + [ROWS * LENGTH] * (n - len(ends))
    return Documents(torch.tensor(bounds, dtype=torch.int32).to(GPU), LENGTH)


def asked(step: Callable[[], None]) -> dict[str, int]:
    """What a step asks of the GPU; only what it asks for at all."""
    before = torch.fakegpu_counts()  # type: ignore[attr-defined]
    step()
    after = torch.fakegpu_counts()  # type: ignore[attr-defined]
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def fake_shapes_of_varlen_are_the_real_ones() -> str:
    """torch.compile plans memory by them; the log-sum-exp differs between builds."""
    operator = torch.ops.torch_attn._varlen_attn
    for kv_heads in (HEADS, 2):
        q, k, v = (t.flatten(0, 1) for t in inputs(kv_heads, torch.bfloat16))
        bounds = documents().cu_seqlens
        real = operator(q, k, v, bounds, bounds, LENGTH, LENGTH, True, None, [-1, 0])
        with FakeTensorMode() as mode:
            q, k, v, bounds = (mode.from_tensor(t) for t in (q, k, v, bounds))
            fake = operator(q, k, v, bounds, bounds, LENGTH, LENGTH, True, None, [-1, 0])
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), (a, b)
    return f"torch {torch.__version__}"


def nothing_waits_or_multiplies() -> str:
    """Packed or in rows, grouped or not, in any dtype: one fused kernel forward, no matmuls."""
    launches = {}
    for dtype in (torch.float32, *HALF):
        for kv_heads in (HEADS, 2):
            for backend in ("torch", "masked"):
                for packed in (None, prepare(documents(), inputs(2, dtype)[0], backend)):
                    q, k, v = inputs(kv_heads, dtype)
                    got = asked(lambda: attention(q, k, v, packed, backend).sum().backward())  # noqa: B023
                    case = (str(dtype), kv_heads, backend, packed is not None)
                    assert not {"GEMMs", "stream syncs", "device syncs"} & set(got), (case, got)
                    launches[case] = got["ATen launches"]
    return f"{min(launches.values())} to {max(launches.values())} launches forward and backward"


def grouped_keys_are_not_repeated() -> str:
    """varlen_attn takes them as they are: its gradient has the shape of the keys."""
    q, k, v = (t.detach().flatten(0, 1).requires_grad_() for t in inputs(2, torch.bfloat16))
    bounds = documents().cu_seqlens
    out = torch_varlen(q, k, v, bounds, bounds, LENGTH)
    out.sum().backward()
    assert out.shape == q.shape
    assert k.grad.shape == k.shape
    return f"{HEADS} and 2 heads"


# The operators that FlashAttention-3 registers (its hopper/flash_api.cpp), by position.
FA3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new, Tensor(v_new!)? v_new, Tensor? q_v, "
    "Tensor(out!)? out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, "
    "Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, "
    "Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, "
    "Tensor? v_descale, float? softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right, int attention_chunk, float softcap, bool is_rotary_interleaved, "
    "Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FA3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq, Tensor(dk!)? dk, Tensor(dv!)? dv, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
    "int? max_seqlen_k, float? softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right, float softcap, bool deterministic, int sm_margin) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def flash_attention_3_serves_packed_documents() -> str:
    """Through PyTorch's registry, eager and compiled, causal from the last query and key back."""
    calls: list[tuple] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, ...]:
        calls.append((k.shape[1], options[21:24]))  # is_causal and both sides of the window
        lse = torch.empty(q.shape[1], q.shape[0], device=GPU)
        return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(0)

    def backward(*options: object) -> tuple[Tensor, ...]:
        calls.append((options[2].shape[1], options[16:19]))
        return (torch.empty(0, device=GPU),) * 5

    library = torch.library.Library("flash_attn_3", "DEF")
    for schema, function in ((FA3_FORWARD, forward), (FA3_BACKWARD, backward)):
        library.define(schema)
        library.impl(schema[:3], function, "CUDA")
    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = forward  # type: ignore[attr-defined]
    sys.modules["flash_attn_interface"] = package
    choice = choose("auto", GPU, torch.bfloat16, MODEL)
    assert choice.packed == "PyTorch's varlen_attn, FlashAttention 3", choice

    def step(q: Tensor, k: Tensor, v: Tensor, packed: Documents) -> Tensor:
        return attention(q, k, v, packed, choice.backend).sum()

    for function in (step, torch.compile(step, fullgraph=True)):
        q, k, v = inputs(2, torch.bfloat16)
        function(q, k, v, documents()).backward()
    assert calls == [(2, (True, -1, 0))] * 4, calls
    return str(choice)


PROPERTIES = (
    fake_shapes_of_varlen_are_the_real_ones,
    nothing_waits_or_multiplies,
    grouped_keys_are_not_repeated,
    flash_attention_3_serves_packed_documents,
)


def main() -> int:
    failed = 0
    for check in PROPERTIES:
        name = check.__name__.replace("_", " ")
        try:
            print(f"ok      {name}: {check()}")
        except AssertionError as error:
            failed += 1
            print(f"FAILED  {name}: {error}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

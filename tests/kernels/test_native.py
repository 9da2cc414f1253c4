"""What is particular to the native CPU kernels.

Every instruction set, threads, the C library's memory, hard numbers.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from exactness import check, leaves, run, same_bits

from fastlm.kernels import (
    add_rms_norm,
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
    native,
    rope,
    swiglu,
)
from fastlm.kernels.loss_options import LossOptions

module = pytest.importorskip(
    "fastlm.kernels._native", reason="the native module is not built (make native)"
)

pytestmark = pytest.mark.usefixtures("cpu_path")
EPS = 1e-5


@pytest.fixture(params=module.instruction_sets())
def instruction_set(request):
    module.use_instruction_set(request.param)
    yield request.param
    module.use_instruction_set(module.instruction_sets()[-1])


def norm_in_fp32(x, r, w):
    s = x + r
    acc = torch.promote_types(s.dtype, torch.float32)
    return F.rms_norm(s.to(acc), s.shape[-1:], w.to(acc), EPS).to(s.dtype), s


def swiglu_in_fp32(x):
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def rotate(q, k, table):
    def one(x):
        acc = torch.promote_types(x.dtype, torch.float32)
        a, b = x.to(acc).chunk(2, -1)
        cos, sin = table[:, : x.shape[1], None].to(acc)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    return one(q), one(k)


# Widths around every vector length: whole vectors, groups of four, and each remainder.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 4, 5, 8, 15, 16, 31, 33, 64, 67, 129])
def test_every_width_on_every_instruction_set(width, dtype, instruction_set):
    torch.manual_seed(width)
    x, r = ((torch.randn(2, 3, width) * 4).round() / 4).to(dtype)
    g, h = torch.randn(2, 3, width).to(dtype)
    check(
        lambda *a: add_rms_norm(*a, EPS),
        norm_in_fp32,
        [x, r, torch.randn(width)],
        [g, h],
        1000 if width == 1 else 1,
    )
    check(swiglu, swiglu_in_fp32, [(torch.randn(3, 2 * width) * 3).to(dtype)], [g])
    q, k = torch.randn(1, 3, 2, 2 * width).to(dtype), torch.randn(1, 3, 1, 2 * width).to(dtype)
    table, up = torch.randn(2, 3, width), [torch.randn_like(q), torch.randn_like(k)]
    check(lambda q, k: rope(q, k, *table), lambda q, k: rotate(q, k, table), [q, k], up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 2047, 2048, 2049, 50257])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_loss_on_every_instruction_set(vocab, softcap, dtype, instruction_set):
    torch.manual_seed(vocab)
    logits, targets = (torch.randn(3, vocab) * 4).to(dtype), torch.randint(vocab, (3,))

    def plain(x):
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return (
            F.cross_entropy(z, targets, reduction="none", label_smoothing=0.1)
            + 1e-3 * z.logsumexp(-1) ** 2
        )

    def ours(x):
        return cross_entropy(
            x, targets, reduction="none", label_smoothing=0.1, z_loss=1e-3, softcap=softcap
        )

    check(ours, plain, [logits], [torch.rand(3)], scale=4 if vocab > 1 else 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 16, 31, 33, 67, 576])
def test_few_rows_times_a_matrix_on_every_instruction_set(width, dtype, instruction_set):
    """Every number of rows, and of outputs, that strips of three and tiles of four leave over.

    Inputs of any strides.
    """
    torch.manual_seed(width)
    for rows, out in ((1, 1), (2, 2), (3, 3), (4, 7), (5, 64), (8, 50), (17, 5), (0, 3)):
        x, w = torch.randn(rows, 2 * width).to(dtype)[:, ::2], torch.randn(out, width).to(dtype)
        expected = x.double() @ w.double().t()
        bound = (x.double().abs() @ w.double().abs().t()) * (
            1e-6 if dtype == torch.float32 else 0
        ) + 1e-12
        found = native.few_rows_linear(x, w)
        assert found.shape == (rows, out)
        rounding = expected.abs() * 2**-8 if dtype == torch.bfloat16 else 0
        assert (
            (found.double() - expected).abs()
            <= bound + rounding + (1e-5 if dtype == torch.bfloat16 else 0)
        ).all()
    assert native.few_rows_linear(torch.ones(2, 3, 4), torch.ones(5, 4)).shape == (2, 3, 5)


def attention_of_every_pair(q, k, v, segments):
    """In float64: of each segment's (queries, keys) the last query sees all keys, the one before it
    one less.
    """
    out, group = torch.zeros(q.shape, dtype=torch.float64), q.shape[1] // k.shape[1]
    lse = torch.zeros(q.shape[:2], dtype=torch.float64)
    i = j = 0
    for n, m in segments:
        keys, values = (
            x[j : j + m].double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v)
        )
        scores = q[i : i + n].double().transpose(0, 1) @ keys.mT / q.shape[2] ** 0.5
        scores = scores.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(1 + m - n), -torch.inf)
        out[i : i + n], lse[i : i + n] = (
            (scores.softmax(-1) @ values).transpose(0, 1),
            scores.logsumexp(-1).T,
        )
        i, j = i + n, j + m
    return out, lse


# Segments around every edge: strips of 6 queries, blocks of 96 and tasks of 384, tiles of 8 to 32
# keys and blocks of 192.
SEGMENTS = {
    "short": [(1, 1), (5, 5), (0, 0), (6, 6), (7, 7), (16, 16), (33, 33)],
    "more keys than queries": [(1, 9), (6, 40), (13, 200), (97, 193)],
    "long": [(385, 385), (96, 96), (100, 400)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(2, 2, 64), (6, 2, 20), (3, 1, 1), (1, 1, 72)]
)
@pytest.mark.parametrize("name", SEGMENTS)
def test_attention_on_every_instruction_set(name, heads, kv_heads, dim, dtype, instruction_set):
    """Tokens of any stride; some behind the last segment, which get 0."""
    torch.manual_seed(dim)
    segments = SEGMENTS[name]
    n, m = (sum(s) + 3 for s in zip(*segments, strict=True))
    cu_q, cu_k = (torch.tensor([0, *s]).cumsum(0) for s in zip(*segments, strict=True))
    packed = torch.randn(n, heads + 1, dim).to(dtype)
    q, k, v = packed[:, :heads], *torch.randn(2, m, kv_heads, dim).to(dtype)
    dout = torch.randn(n, dim, heads).to(dtype).transpose(1, 2)
    out, lse = native.attention(q, k, v, cu_q, cu_k)
    grads = native.attention_backward(dout, q, k, v, out, lse, cu_q, cu_k)
    exact = leaves(*(x.double() for x in (q, k, v)))
    expected, expected_lse = attention_of_every_pair(*exact, segments)
    wanted = torch.autograd.grad(expected, exact, dout.double())
    rough = dict(rtol=1e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=3e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-5)
    for a, e in zip((out, *grads), (expected, *wanted), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), e.to(dtype).double(), **rough)
    assert not out[-3:].any()
    assert not grads[1][-3:].any()


def test_attention_of_large_scores_does_not_overflow(instruction_set):
    q, k, v = (torch.randn(40, 1, 16) * s for s in (300.0, 300.0, 1.0))
    cu = torch.tensor([0, 40])
    out, _ = native.attention(q, k, v, cu, cu)
    expected, _ = attention_of_every_pair(q, k, v, [(40, 40)])
    torch.testing.assert_close(
        out.double(), expected, rtol=1e-3, atol=1e-3
    )  # scores of 1e5 are known to 0.01


def test_boundaries_that_fall_or_pass_the_end_are_an_index_error():
    q = torch.randn(4, 1, 8)
    for wrong in ([0, 5], [0, 3, 2], [-1, 4]):
        with pytest.raises(
            IndexError,
            match="cu_seqlens.* is -?[0-9]+; boundaries must not fall, from 0 to at most 4 tokens",
        ):
            native.attention(q, q, q, torch.tensor(wrong), torch.tensor(wrong))


def test_numbers_at_the_edge(instruction_set):
    """Saturated gates, masked and enormous logits: no overflow, no loss of the exact zeros."""
    gates = torch.tensor([-1e4, -200.0, -88.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 200.0, 1e4])
    x = torch.cat((gates, torch.full((10,), 2.0)))
    torch.testing.assert_close(swiglu(x), F.silu(gates.double()).float() * 2, rtol=1e-6, atol=1e-30)
    logits = torch.tensor(
        [[0.0, 1.0, -torch.inf, 2.0], [3e38, -3e38, 0.0, 0.0], [-1000.0, -1001.0, -1e38, -5000.0]]
    )
    targets = torch.tensor([1, 0, 0])
    actual = run(
        lambda z: cross_entropy(z, targets, reduction="none"), leaves(logits), [torch.ones(3)]
    )
    expected = run(
        lambda z: F.cross_entropy(z, targets, reduction="none"),
        leaves(logits.double()),
        [torch.ones(3)],
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            a.double(), e, rtol=1e-6, atol=5e-5
        )  # 1000 is known to 6e-5 in fp32
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=1e-7)
    assert actual[1][0, 2] == 0  # a masked token gets exactly nothing
    assert cross_entropy(torch.tensor([[0.0, torch.nan]]), torch.tensor([0])).isnan()
    assert swiglu(torch.tensor([torch.nan, 1.0])).isnan()


def everything() -> list[torch.Tensor]:
    """Results and gradients of all ops on one set of inputs."""
    torch.manual_seed(1)
    x, r, g, h = torch.randn(4, 131, 96)
    q, k = torch.randn(2, 13, 4, 24), torch.randn(2, 13, 2, 24)
    w, targets = torch.randn(501, 96), torch.randint(501, (131,))
    targets[::5] = -100
    table = torch.randn(2, 20, 12)
    out = run(lambda *a: add_rms_norm(*a, EPS), leaves(x, r, torch.randn(96)), [g, h])
    out += run(swiglu, leaves(x), [torch.randn(131, 48)])
    out += run(lambda a, b: rope(a, b, *table), leaves(q, k), [q, k])
    for op in (linear_cross_entropy, linear_logprobs):
        out += run(
            lambda a, b, op=op: op(a, b, targets),
            leaves(x, w),
            [g[:, 0] if op is linear_logprobs else g[0, 0]],
        )
    return out


def attend() -> list[torch.Tensor]:
    torch.manual_seed(2)
    (q, dout), (k, v), cu = (
        torch.randn(2, 900, 4, 24),
        torch.randn(2, 900, 2, 24),
        torch.tensor([0, 700, 720, 900]),
    )
    out, lse = native.attention(q, k, v, cu, cu)
    return [out, lse, *native.attention_backward(dout, q, k, v, out, lse, cu, cu)]


def test_results_do_not_depend_on_the_number_of_threads(instruction_set):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attend() + everything())
    torch.set_num_threads(before)
    ours_alone = slice(0, 16)  # behind a matmul the bits are the BLAS's business
    for other in results[1:]:
        assert all(
            same_bits(a, b) for a, b in zip(results[0][ours_alone], other[ours_alone], strict=True)
        )


def test_native_and_reference_agree(monkeypatch):
    ours = everything()
    monkeypatch.setattr(native, "available", lambda *tensors: False)
    for a, e in zip(ours, everything(), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5)


def test_dtypes_without_a_native_kernel_take_the_reference(monkeypatch):
    for name in ("rms_norm", "swiglu", "rope", "cross_entropy_rows"):
        monkeypatch.delattr(native, name)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))
    assert swiglu(x.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_too_large_for_a_cache_have_the_same_bits(dtype, instruction_set):
    """Above 16 MiB they are written past the cache; row by row, below that, nothing differs."""
    rows, width = 64 * (66 if dtype == torch.float32 else 131), 1024
    x, dy, w, rstd = *torch.randn(2, rows, width).to(dtype), torch.randn(width), torch.rand(rows)
    part = slice(64, 128)
    assert same_bits(
        native.rms_norm(x, None, w, EPS)[0][part], native.rms_norm(x[part], None, w, EPS)[0]
    )
    big = native.rms_norm_backward(dy, x, w, rstd, None)
    small = native.rms_norm_backward(dy[part], x[part], w, rstd[part], None)
    assert same_bits(big[0][part], small[0])
    packed = torch.cat((x, dy), -1)
    big, small = (
        native.swiglu_backward(g, p, True) for g, p in ((dy, packed), (dy[part], packed[part]))
    )
    assert same_bits(big[0][part], small[0])
    heads, table = torch.cat((x, x)).view(1, 2 * rows, 16, 64), torch.randn(2, 2 * rows, 32)
    big = native.rope(heads, heads, *table, None, False)
    small = native.rope(heads[:, :64], heads[:, :64], *table, None, False)
    assert all(same_bits(b[:, :64], s) for b, s in zip(big, small, strict=True))


def test_gradient_of_logits_may_overwrite_them():
    logits, targets = torch.randn(5, 70), torch.randint(64, (5,))
    targets[2] = -100
    options = LossOptions(z_loss=1e-3, label_smoothing=0.1, vocab_size=64)
    loss, lse, up = torch.empty(5), torch.empty(5), torch.rand(5)
    apart = torch.empty_like(logits)
    native.cross_entropy_rows(logits, targets, loss, lse, None, None, options)
    native.cross_entropy_rows(logits, targets, None, lse, up, apart, options)
    native.cross_entropy_rows(logits, targets, loss, lse, up, logits, options)
    torch.testing.assert_close(logits, apart, rtol=1e-6, atol=1e-8)
    assert not logits[2].any()
    assert not logits[:, 64:].any()


def test_upstream_gradients_may_have_any_strides():
    h, w, targets = torch.randn(6, 8), torch.randn(40, 8), torch.randint(40, (6,))
    for up in (torch.full((1,), 0.5).expand(6), torch.randn(6, 3)[:, 1], torch.randn(12)[::2]):
        ours = run(
            lambda a, b: linear_cross_entropy(a, b, targets, reduction="none"), leaves(h, w), [up]
        )
        plain = run(
            lambda a, b: F.cross_entropy(a @ b.t(), targets, reduction="none"), leaves(h, w), [up]
        )
        for a, e in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_position_outside_the_table_is_an_index_error():
    q = torch.randn(1, 2, 1, 4)
    with pytest.raises(IndexError, match="position 3 .* 3 positions"):
        rope(q, q, *torch.randn(2, 3, 2), torch.tensor([[0, 3]]))
    with pytest.raises(IndexError, match="position -1"):
        rope(q, q, *torch.randn(2, 3, 2), torch.tensor([[0, -1]]))


def test_unknown_instruction_set_is_named():
    with pytest.raises(ValueError, match="'sse9'"):
        module.use_instruction_set("sse9")
    assert module.instruction_set() == module.instruction_sets()[-1]


def test_status_says_what_runs():
    assert native.status().startswith(f"native, {module.instruction_set()} ")
    assert f"{torch.get_num_threads()} threads" in native.status()


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads through /proc")
@pytest.mark.skipif(not module.openmp(), reason="built without OpenMP")
def test_kernels_run_on_torchs_own_threads():
    code = """
import os, torch
from fastlm.kernels import native
torch.set_num_threads(3)
(torch.ones(1 << 20) + 1).sum()
before = len(os.listdir("/proc/self/task"))
native.swiglu(torch.randn(4096, 256))
print(before, len(os.listdir("/proc/self/task")))
"""
    before, after = in_fresh_python(code).split()
    assert before == after


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc returns large blocks in this way"
)
@pytest.mark.skipif(
    "sanitized" in sys.modules, reason="AddressSanitizer takes the place of glibc's allocator"
)
def test_large_blocks_stay_with_the_process_once_asked():
    code = """
import torch
from fastlm.kernels import native
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def left_after_freeing(mib):
    before = resident()
    torch.zeros(mib << 18).add_(1)
    return (resident() - before) >> 20
torch.ones(10).add_(1)
print(left_after_freeing(128), native.keep_large_blocks(), left_after_freeing(128))
"""
    without, took_effect, kept = in_fresh_python(code).split()
    assert took_effect == "True"
    assert int(without) < 32
    assert int(kept) > 96


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 instruction sets")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_each_instruction_set_is_compiled_and_kept_apart():
    """512-bit code exists for AVX-512; what every machine runs holds no wide register."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", module.__file__]
    dump = subprocess.run(command, capture_output=True, text=True, check=True)
    wide, function = {"zmm": set(), "ymm": set()}, ""
    for line in dump.stdout.splitlines():
        if line.endswith(">:"):
            function = line
        for register in wide:
            if register in line:
                wide[register].add(function)
    assert any("fastlm::avx512::" in f for f in wide["zmm"])
    assert all("fastlm::avx512::" in f for f in wide["zmm"])
    assert all("fastlm::avx2::" in f or "fastlm::avx512::" in f for f in wide["ymm"])

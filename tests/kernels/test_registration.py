"""What PyTorch expects of an op.

Opcheck, gradcheck, torch.compile, autocast, checkpointing, hooks, copies.
"""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import same_bits
from torch import nn

from fastlm import kernels
from fastlm.kernels.cross_entropy import _cross_entropy
from fastlm.kernels.linear_cross_entropy import _linear_cross_entropy, _linear_nll
from fastlm.kernels.loss_options import LossOptions
from fastlm.kernels.rms_norm import _add_rms_norm, _rms_norm
from fastlm.kernels.rope import _rope
from fastlm.kernels.swiglu import _swiglu

N, D, V = 6, 16, 24
TARGETS = torch.tensor([0, 23, -100, 5, 7, 7])


def rand(*shape, grad=True, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def op_calls():
    options = LossOptions().flat()
    cos = torch.rand(8, 4)
    return {
        "rms_norm": (_rms_norm, (rand(N, D), rand(D), 1e-5)),
        "add_rms_norm": (_add_rms_norm, (rand(N, D), rand(N, D), rand(D), 1e-5)),
        "rope": (_rope, (rand(2, 5, 4, 8), rand(2, 5, 2, 8), cos, cos, None, False)),
        "rope at positions": (
            _rope,
            (rand(2, 5, 4, 8), rand(2, 5, 2, 8), cos, cos, torch.randint(8, (2, 5)), True),
        ),
        "swiglu": (_swiglu, (rand(N, 2 * D),)),
        "cross_entropy": (_cross_entropy, (rand(N, V), TARGETS, options)),
        "linear_cross_entropy": (
            _linear_cross_entropy,
            (rand(N, D), rand(V, D), rand(V), TARGETS, options, 4 * V * 3, -1, True, True),
        ),
        "linear_nll": (
            _linear_nll,
            (rand(N, D), rand(V, D), None, TARGETS, options, 4 * V * 3, -1, 0),
        ),
        "linear_nll kept": (
            _linear_nll,
            (rand(N, D), rand(64, D), None, TARGETS, options, 4 * 64 * 3, -1, 3),
        ),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name, cpu_path):
    op, args = op_calls()[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", ["rms_norm", "cross_entropy"])
def test_opcheck_of_the_triton_path(name, device):
    op, args = op_calls()[name]
    args = [leaf(x, device) if isinstance(x, torch.Tensor) else x for x in args]
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def leaf(x, device):
    return x.detach().to(device).requires_grad_(x.requires_grad)


def functions():
    cos, sin = torch.rand(2, 8, 4, dtype=torch.float64).unbind(0)
    everything = {
        "z_loss": 0.1,
        "label_smoothing": 0.2,
        "softcap": 3.0,
        "vocab_size": V - 2,
        "reduction": "none",
    }
    targets = TARGETS.clamp(max=V - 3)
    return {
        "rms_norm": (lambda x, w: kernels.rms_norm(x, w, 1e-5), [(N, D), (D,)]),
        "add_rms_norm": (
            lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5),
            [(N, D), (N, D), (D,)],
        ),
        "rope": (lambda q, k: kernels.rope(q, k, cos, sin), [(2, 5, 4, 8), (2, 5, 2, 8)]),
        "swiglu": (kernels.swiglu, [(N, 2 * D)]),
        "cross_entropy": (lambda z: kernels.cross_entropy(z, targets, **everything), [(N, V)]),
        "linear_cross_entropy": (
            lambda h, w, b: kernels.linear_cross_entropy(h, w, TARGETS, bias=b),
            [(N, D), (V, D), (V,)],
        ),
        "linear_cross_entropy by rows": (
            lambda h, w: kernels.linear_cross_entropy(h, w, targets, **everything),
            [(N, D), (V, D)],
        ),
        "linear_logprobs": (lambda h, w: kernels.linear_logprobs(h, w, TARGETS), [(N, D), (V, D)]),
        "linear": (kernels.linear, [(2, 3, D), (7, D)]),
        "linear in parts": (lambda x, m: kernels.linear(x, m, (4, 2, 1)), [(2, 3, D), (7, D)]),
        "swiglu_linear": (lambda x, m: kernels.swiglu_linear(x, m), [(N, 2 * D), (7, D)]),
    }


@pytest.mark.parametrize("name", functions())
def test_gradcheck_in_float64(name, cpu_path):
    fn, shapes = functions()[name]
    assert torch.autograd.gradcheck(fn, [rand(*s, dtype=torch.float64) for s in shapes])


def block(x, r, norm, gate_up, weight, targets):
    """Every op but RoPE in one function."""
    y, s = kernels.add_rms_norm(x, r, norm, 1e-5)
    first, second = kernels.linear(y, gate_up.t(), (D, D))
    z = kernels.swiglu_linear(torch.cat((first, second), -1), weight) + s
    z = kernels.rms_norm(z, norm, 1e-5)
    q, k = kernels.rope(
        z.view(1, -1, 2, D // 2), z.view(1, -1, 2, D // 2), *torch.ones(2, 40, D // 4)
    )
    z = (q + k).view_as(z)
    return (
        kernels.linear_cross_entropy(z, weight, targets, z_loss=1e-3)
        - kernels.linear_logprobs(z, weight, targets).mean()
    )


def block_inputs(n, dtype=torch.float32):
    torch.manual_seed(n)
    floats = [
        torch.randn(*s).to(dtype).requires_grad_()
        for s in [(n, D), (n, D), (D,), (D, 2 * D), (D, D)]
    ]
    return [
        *floats,
        torch.randint(-1, D, (n,)).masked_fill(torch.arange(n) % 3 == 0, -100).clamp(min=-100),
    ]


def loss_and_gradients(fn, inputs):
    loss = fn(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])]


def test_compiled_whole_forward_and_backward_equal_eager(cpu_path):
    compiled = torch.compile(block, fullgraph=True)
    for a, b in zip(
        loss_and_gradients(compiled, i := block_inputs(12)),
        loss_and_gradients(block, i),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_another_number_of_rows_recompiles_at_most_once(cpu_path):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for n in (12, 9, 17, 30):
        compiled(*block_inputs(n))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtypes_the_docstrings_state(dtype, cpu_path):
    x, w, head = rand(N, D), rand(D), rand(V, D)
    with torch.autocast("cpu", dtype):
        for given in (torch.float32, dtype):
            assert kernels.rms_norm(x.to(given), w, 1e-5).dtype == given
            assert kernels.swiglu(x.to(given)).dtype == given
            assert kernels.cross_entropy(head.t().to(given), torch.arange(D)).dtype == torch.float32
            assert kernels.linear(x.to(given), head).dtype == dtype
            assert kernels.swiglu_linear(x.to(given), rand(3, D // 2)).dtype == dtype
            loss = kernels.linear_cross_entropy(x.to(given), head, TARGETS)
            assert (
                loss.dtype
                == kernels.linear_logprobs(x.to(given), head, TARGETS).dtype
                == torch.float32
            )
    loss.backward()
    assert head.grad.dtype == x.grad.dtype == torch.float32


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gate_up = nn.Parameter(torch.rand(D)), nn.Parameter(torch.randn(D, 2 * D))
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x, targets):
        return block(x, x, self.norm, self.gate_up, self.weight, targets)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_checkpointing_hooks_copies_and_functional_call_change_nothing(cpu_path):
    from torch.autograd.graph import save_on_cpu
    from torch.utils.checkpoint import checkpoint

    model, (x, *_, targets) = Tiny(), block_inputs(9)
    targets = targets.clamp(min=0)
    expected = gradients(model, model(x, targets))
    twin = copy.deepcopy(model)
    with save_on_cpu():
        hooked = model(x, targets)
    others = [
        gradients(model, checkpoint(model, x, targets, use_reentrant=False)),
        gradients(twin, twin(x, targets)),
        gradients(model, hooked),
        gradients(
            model, torch.func.functional_call(model, dict(model.named_parameters()), (x, targets))
        ),
    ]
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(expected, other, strict=True))

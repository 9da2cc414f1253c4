"""Which attention a run takes, against the GPU and the packages that stand in for what is there."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from fastlm import attention_backend as module
from fastlm.attention_backend import choose
from fastlm.config import PRESETS, SftConfig
from fastlm.errors import UserError
from fastlm.train import run

CPU = torch.device("cpu")
GPU = torch.device("cuda")
TINY = PRESETS["tiny"]
FLASH2 = {"flash_attn": ["flash_attn_func", "flash_attn_varlen_func"]}
FLASH3 = {"flash_attn_interface": ["flash_attn_func", "flash_attn_varlen_func"]}
FLASH4 = {  # the package that ships flash_attn.cute has nothing in flash_attn itself
    "flash_attn": [],
    "flash_attn.cute": ["flash_attn_func", "flash_attn_varlen_func"],
    "flash_attn.cute.interface": ["_flash_attn_fwd", "_flash_attn_bwd"],
}
XFORMERS = {"xformers": [], "xformers.ops": ["memory_efficient_attention"]}


@pytest.fixture(scope="module")
def flash3_operators() -> torch.library.Library:
    """The operators that FlashAttention-3 registers, by name."""
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define("fwd(Tensor q) -> Tensor")
    library.define("bwd(Tensor q) -> Tensor")
    return library


@pytest.fixture
def machine(monkeypatch, flash3_operators) -> Iterator:
    """Sets up a GPU of some capability with some packages installed."""

    def set_up(capability: tuple[int, int], *packages: dict[str, list[str]]) -> None:
        monkeypatch.setattr(module, "capability", lambda device: capability)
        monkeypatch.setattr(module, "sdpa_kernel", lambda *args, **options: "SDPA kernel")
        names = {name for package in (FLASH2, FLASH3, FLASH4, XFORMERS) for name in package}
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)  # not there: importing it fails
        for package in packages:
            for name, functions in package.items():
                fake = types.ModuleType(name)
                for function in functions:
                    setattr(fake, function, lambda *args: None)
                monkeypatch.setitem(sys.modules, name, fake)

    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield set_up
    module.activate(None)
    torch.backends.cuda.enable_cudnn_sdp(before)


H100, B200, A100, T4, RTX_5090 = (9, 0), (10, 0), (8, 0), (7, 5), (12, 0)
TORCH = "PyTorch's varlen_attn, FlashAttention 2"
MASK = "PyTorch's SDPA kernel, with a mask"
CASES = {
    "nothing installed": (H100, [], "torch", TORCH),
    "flash-attn 2 does not come before PyTorch": (H100, [FLASH2], "torch", TORCH),
    "flash-attn 3": (H100, [FLASH2, FLASH3], "torch", TORCH.replace("2", "3")),
    "flash-attn 3 before 4": (H100, [FLASH4, FLASH3], "torch", TORCH.replace("2", "3")),
    "flash-attn 4": (H100, [FLASH4], "torch", TORCH.replace("2", "4")),
    "flash-attn 4 on sm_100": (B200, [FLASH3, FLASH4], "torch", TORCH.replace("2", "4")),
    "flash-attn 3 serves sm_90 only": (B200, [FLASH3], "torch", TORCH),
    "neither serves sm_120": (RTX_5090, [FLASH3, FLASH4], "torch", TORCH),
    "flash-attn 2 below sm_90": (A100, [FLASH2], "flash", "flash"),
    "flash-attn 4's folder is not flash-attn 2": (A100, [FLASH4], "torch", TORCH),
    "xformers is never taken by itself": (A100, [XFORMERS], "torch", TORCH),
    "no FlashAttention below sm_80": (T4, [FLASH2, XFORMERS], "masked", MASK),
}


@pytest.mark.parametrize("name", CASES)
def test_auto_takes_the_fastest_attention_that_can_serve(machine, name):
    capability, packages, backend, packed = CASES[name]
    machine(capability, *packages)
    choice = choose("auto", GPU, torch.bfloat16, TINY)
    assert (choice.backend, choice.packed) == (backend, packed)
    assert f"sm_{capability[0]}{capability[1]}" in choice.why
    assert str(choice) == f"rows: {choice.rows}; packed documents: {packed}; because: {choice.why}"


def test_fp32_takes_pytorch_and_a_mask(machine):
    machine(H100, FLASH2, FLASH3)
    choice = choose("auto", GPU, torch.float32, TINY)
    assert (choice.backend, choice.packed) == ("torch", MASK)


def test_amd_takes_flash_attn_or_else_a_mask(machine, monkeypatch):
    """ROCm's varlen_attn has another log-sum-exp, and no promise for fewer queries than keys."""
    machine((9, 4), FLASH3)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose("auto", GPU, torch.bfloat16, TINY).packed == MASK
    machine((9, 4), FLASH2)
    assert choose("auto", GPU, torch.bfloat16, TINY).backend == "flash"


def test_the_cpu_has_its_own(machine):
    machine(H100, FLASH2, FLASH3)
    assert choose("auto", CPU, torch.float32, TINY).backend == "torch"
    with pytest.raises(UserError, match="attention flash needs a GPU"):
        choose("flash", CPU, torch.float32, TINY)


def test_flash_attention_3_asked_for_comes_before_cudnn(machine):
    from torch.nn.attention import current_flash_attention_impl

    machine(H100, FLASH3)
    torch.backends.cuda.enable_cudnn_sdp(True)
    choose("auto", GPU, torch.bfloat16, TINY)
    assert current_flash_attention_impl() == "FA3"
    assert torch.backends.cuda.cudnn_sdp_enabled()
    choose("flash3", GPU, torch.bfloat16, TINY)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    choose("torch", GPU, torch.bfloat16, TINY)
    assert current_flash_attention_impl() is None


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "packages", "words"),
    [
        ("flash", H100, torch.bfloat16, [], "is not installed"),
        ("flash", H100, torch.bfloat16, [FLASH4], "has no flash_attn_func"),
        ("flash", H100, torch.float32, [FLASH2], "this run is in torch.float32"),
        ("flash", T4, torch.float16, [FLASH2], "from sm_80 on"),
        ("flash3", A100, torch.bfloat16, [FLASH3], "serves sm_9x"),
        ("flash4", RTX_5090, torch.bfloat16, [FLASH4], "serves sm_9x and sm_10x"),
        ("xformers", H100, torch.bfloat16, [], "is not installed"),
    ],
)
def test_what_is_named_but_cannot_run_is_one_clear_line(
    machine, name, capability, dtype, packages, words
):
    machine(capability, *packages)
    with pytest.raises(UserError, match=words) as error:
        choose(name, GPU, dtype, TINY)
    assert str(error.value).startswith(f"attention {name} ")
    assert "\n" not in str(error.value)


def test_xformers_is_not_compiled_with_packed_documents(machine, monkeypatch):
    machine(H100, XFORMERS)
    monkeypatch.setattr(run, "matmul_dtype", lambda device: torch.bfloat16)
    cfg = SftConfig(attention="xformers")
    assert run.choose_attention(cfg, GPU, TINY, packed=True).backend == "xformers"
    compiled = dataclasses.replace(cfg, compile=True)
    assert run.choose_attention(compiled, GPU, TINY, packed=False).backend == "xformers"
    with pytest.raises(UserError, match="leave --compile or --attention out"):
        run.choose_attention(compiled, GPU, TINY, packed=True)

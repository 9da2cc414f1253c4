"""Which attention a run takes on its device, and why: decided once, before anything is compiled.

    fp32, or no GPU       PyTorch's own
    sm_90 and newer       PyTorch's own: SDPA for rows, where cuDNN leads by PyTorch's own order (at
                          head 64 and T 1024 288 TFLOP/s forward, FlashAttention-3 265, 2 229:
                          FlashAttention-3 paper, figure 5), varlen_attn for packed documents, in
                          which FlashAttention-3 (sm_90) or 4 (sm_90, sm_100) serves if installed
    sm_80 to sm_89        the flash-attn package if installed, else PyTorch's FlashAttention 2
    older, and AMD        PyTorch's SDPA; packed documents with a mask (on AMD flash-attn first)

xformers is taken by name only: its packed path waits for the GPU twice a layer, and torch.compile
cannot follow it. The packages' calls follow their published signatures and PyTorch's registry; none
has run here, nor has anything on an AMD GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import torch

from fastlm.config import ModelConfig
from fastlm.errors import check
from fastlm.kernels import native
from fastlm.kernels.attention import HALF

# In PyTorch's registry, and the generations of GPUs that PyTorch lets each serve
FLASH = {"flash3": ("FA3", (9,)), "flash4": ("FA4", (9, 10))}
PACKAGES = {
    "flash": ("flash_attn", ("flash_attn_func", "flash_attn_varlen_func")),
    "flash3": ("flash_attn_interface", ("flash_attn_func",)),
    "flash4": ("flash_attn.cute", ("flash_attn_func",)),
    "xformers": ("xformers.ops", ("memory_efficient_attention",)),
}
KERNELS = {
    "CUDNN_ATTENTION": "cuDNN",
    "EFFICIENT_ATTENTION": "the memory-efficient kernel",
    "MATH": "whole matrices of scores",
}


@dataclass(frozen=True)
class Choice:
    """backend: what attention() is told. rows, packed, why: what then runs and why, in words."""

    backend: str
    rows: str
    packed: str
    why: str

    def __str__(self) -> str:
        return f"rows: {self.rows}; packed documents: {self.packed}; because: {self.why}"


def choose(name: str, device: torch.device, dtype: torch.dtype, config: ModelConfig) -> Choice:
    """The attention of that name for a model, or the best one where the name is auto.

    dtype: that of the matmuls. FlashAttention-3 and 4 take the place of PyTorch's own in this
    process; asked for by name, they also come before cuDNN. Raises UserError where what is named
    cannot run.
    """
    if device.type != "cuda":
        check(name in ("auto", "torch"), f"attention {name} needs a GPU; leave --attention out")
        built = native.available(torch.empty(0))
        kernel = "native C++" if built else "PyTorch's CPU operator"
        return Choice("torch", kernel, kernel, f"tensors are on {device.type}")
    if name == "auto":
        name, why = preferred(device, dtype)
    else:
        why = f"asked for: {name}"
        problem = unusable(name, device, dtype)
        check(not problem, f"attention {name} {problem}; leave --attention out")
        if name in FLASH:
            torch.backends.cuda.enable_cudnn_sdp(False)
    activate(FLASH[name][0] if name in FLASH else None)
    if name in ("flash", "xformers"):
        return Choice(name, name, name, why)
    masked = torch.version.hip is not None or capability(device) < (8, 0)
    backend = "masked" if masked else "torch"
    grouped = backend == "torch" and dtype in HALF
    rows = "PyTorch's " + sdpa_kernel(device, dtype, config, grouped)
    if grouped:
        return Choice(backend, rows, f"PyTorch's varlen_attn, {flash_attention()}", why)
    with_mask = sdpa_kernel(device, dtype, config, grouped, mask=True)
    return Choice(backend, rows, f"PyTorch's {with_mask}, with a mask", why)


def preferred(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The name that auto stands for on this GPU, and why."""
    if dtype not in HALF:
        return "torch", f"only PyTorch's own attention takes {dtype}"
    order: tuple[str, ...] = ("flash",)
    if torch.version.hip is not None:
        gpu = "an AMD GPU"
    else:
        major, minor = capability(device)
        gpu = f"sm_{major}{minor}"
        order = ("flash3", "flash4") if major >= 9 else ("flash",) if major == 8 else ()
    problems = []
    for name in order:
        problem = unusable(name, device, dtype)
        if not problem:
            return name, f"{gpu}, and {name} is installed"
        problems.append(f"{name} {problem}")
    return "torch", ", ".join([gpu, *problems])


def unusable(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What keeps the backend of that name from running here; empty where nothing does."""
    if name == "torch":
        return ""
    if dtype not in HALF:
        return f"takes fp16 or bf16, and this run is in {dtype}"
    on_nvidia = torch.version.hip is None
    if name == "flash" and on_nvidia and capability(device) < (8, 0):
        return "serves NVIDIA GPUs from sm_80 on"
    if name in FLASH and not (on_nvidia and capability(device)[0] in FLASH[name][1]):
        return "serves " + " and ".join(f"sm_{major}x" for major in FLASH[name][1])
    if name == "flash4" and torch.__version__ < "2.12":
        return "needs torch 2.12"
    package, functions = PACKAGES[name]
    try:
        found = import_module(package)
        if name in FLASH:
            activate(FLASH[name][0])
    except ModuleNotFoundError:
        return "is not installed"
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or in part
        return f"does not import ({(str(error).splitlines() or ['no reason'])[0]})"
    missing = [function for function in functions if not hasattr(found, function)]
    return f"has no {missing[0]}" if missing else ""


def activate(implementation: str | None) -> None:
    """Put FA3 or FA4 in the place of PyTorch's FlashAttention 2, or that back into its place."""
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        restore_flash_attention_impl,
    )

    if current_flash_attention_impl() == implementation:
        return
    if implementation is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(implementation)


def flash_attention() -> str:
    """Which FlashAttention PyTorch's operators run."""
    from torch.nn.attention import current_flash_attention_impl

    return {"FA3": "FlashAttention 3", "FA4": "FlashAttention 4"}.get(
        current_flash_attention_impl() or "", "FlashAttention 2"
    )


def sdpa_kernel(
    device: torch.device, dtype: torch.dtype, config: ModelConfig, grouped: bool, mask: bool = False
) -> str:
    """The kernel that SDPA takes for the model's causal rows: asked of PyTorch itself.

    grouped: whether keys and values come as they are, or repeated.
    """
    from torch.nn.attention import SDPBackend

    length = 128
    heads = config.n_heads
    kv_heads = config.n_kv_heads if grouped else heads
    q = torch.empty(1, length, heads, config.head_dim, dtype=dtype, device=device)
    k = torch.empty(1, length, kv_heads, config.head_dim, dtype=dtype, device=device)
    attn_mask = torch.empty(1, 1, length, length, dtype=dtype, device=device) if mask else None
    choice = torch._fused_sdp_choice(
        q.transpose(1, 2).requires_grad_(),
        k.transpose(1, 2),
        k.transpose(1, 2),
        attn_mask,
        is_causal=not mask,
        enable_gqa=heads != kv_heads,
    )
    name = SDPBackend(choice).name
    return flash_attention() if name == "FLASH_ATTENTION" else KERNELS.get(name, name)


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)

"""`fastlm doctor`: what this machine has, which implementation every operation takes, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import torch
from rich.table import Table

from fastlm import kernels
from fastlm.attention_backend import choose
from fastlm.config import PRESETS, DoctorConfig
from fastlm.errors import UserError
from fastlm.kernels import native
from fastlm.monitor import wide_console
from fastlm.runtime import GRAPH_PARAMETERS, matmul_dtype, matmul_rate, pick_device
from fastlm.tokenizer import load_tokenizer

OPTIONAL = {
    "flash-attn": "attention on sm_80 to sm_89, and on AMD GPUs",
    "flash-attn-3": "attention of packed documents on sm_90",
    "flash-attn-4": "attention of packed documents on sm_100, and on sm_90 without flash-attn-3",
    "xformers": "by name only: packed documents wait for the GPU in every layer, uncompiled",
    "transformers": "models other than Llama's family",
    "tensorboard": "--tensorboard",
    "lm-eval": "its tasks with a fastlm model",
}
DTYPES = {
    torch.float32: "fp32 on CPUs",
    torch.bfloat16: "a GPU that has bf16",
    torch.float16: "a GPU without bf16; the loss is scaled",
}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def kernel_choice(device: torch.device) -> tuple[str, str]:
    """Which kernels the fused operations take for tensors on this device, and why."""
    if device.type == "cuda":
        return "Triton", f"tensors are on {torch.cuda.get_device_name(device)}"
    if native.available(torch.empty(0)):
        return "native C++", f"tensors are on the CPU; {native.status()}"
    return "PyTorch reference", native.status()


def doctor(cfg: DoctorConfig) -> int:
    """Print the machine, the choice for every operation with its reason, and what else is there."""
    console = wide_console()
    device = pick_device("auto")
    dtype = matmul_dtype(device)
    machine = Table("machine", "", box=None, title_justify="left")
    threads = f"{torch.get_num_threads()} threads in use"
    machine.add_row("processor", f"{platform.machine()}, {os.cpu_count()} cores, {threads}")
    gpu = "none that this PyTorch can use"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
    machine.add_row("GPU", gpu)
    rate = f"{matmul_rate(device, dtype) / 1e9:,.0f} GFLOP/s in {dtype}, measured just now"
    machine.add_row("matmul rate", rate)
    machine.add_row("Python, torch", f"{platform.python_version()}, {torch.__version__}")
    triton = version("triton") or "not installed: the fused kernels cannot run on a GPU"
    machine.add_row("triton", triton)
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    machine.add_row("C++ compiler", compiler or "none: --compile does not work on a CPU")
    console.print(machine)

    choices = Table("operation", "takes", "because", box=None)
    for op in sorted({*kernels.__all__} - {"attention"}):  # it has two lines of its own
        choices.add_row(op, *kernel_choice(device))
    attention = choose("auto", device, dtype, PRESETS["modern-253m"])
    choices.add_row("attention of rows", attention.rows, attention.why)
    choices.add_row("attention of packed documents", attention.packed, attention.why)
    choices.add_row("training dtype", str(dtype), DTYPES[dtype])
    if device.type == "cuda":
        replayed = f"--compile of models up to {GRAPH_PARAMETERS / 1e6:.0f}M parameters; writing"
        reason = "launching takes the host longer than the GPU's work"
        choices.add_row("CUDA graphs", replayed, reason)
    try:
        size = f"{load_tokenizer('gpt2').vocab_size:,} tokens"
        choices.add_row("tokenizer gpt2", size, "packaged files, SHA-256 verified")
    except UserError as e:
        choices.add_row("tokenizer gpt2", "unusable", str(e))
    console.print(choices)

    extras = Table("optional", "version", "used for", box=None)
    for package, use in OPTIONAL.items():
        extras.add_row(package, version(package) or "not installed", use)
    console.print(extras)
    return 0

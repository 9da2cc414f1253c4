"""What the Triton kernels compile to and move, without a GPU: the tables of `fastlm kernels`.

Launches are recorded on tensors without storage, compiled for each architecture, and the binaries read with the tools
inside the triton wheel. Traffic is counted in Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

TARGETS = {
    **{f"sm_{n}": ("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)},
    "gfx942": ("hip", "gfx942", 64),
}
# Multiprocessors and bytes of L2 cache of an A100, an H100 and a B200: 64 warps and 65,536 registers to a multiprocessor.
DEVICES = {"sm_80": (108, 40 << 20), "sm_90": (132, 50 << 20), "sm_100": (148, 126 << 20)}
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel, its arguments by name, its grid and its warps."""

    kernel: Any
    arguments: dict
    grid: tuple
    num_warps: int


@dataclass(frozen=True)
class Binary:
    """What one compiled launch is made of. Widths are of the widest global access, in bits; spills in bytes a thread."""

    kernel: str
    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    fp64: int
    atomics: int


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches that call() would make; nothing runs."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def run(kernel, *args, grid, warmup, num_warps=4, **kwargs):
        names = [p.name for p in kernel.params]
        found.append(Launch(kernel, {**dict(zip(names, args, strict=False)), **kwargs}, grid, num_warps))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return found


def compiled(launch: Launch, target: str) -> Any:
    """The launch's kernel compiled for one of TARGETS, its arguments specialised as Triton's own launcher does."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(launch.kernel.params):
        value = launch.arguments[p.name]
        divisible = False
        if p.is_constexpr or not isinstance(value, torch.Tensor | int | float) or isinstance(value, bool):
            signature[p.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name], divisible = "*" + NAMES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        elif value == 1 and not p.do_not_specialize:
            signature[p.name], constants[(i,)] = "constexpr", 1
        else:
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not p.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options={"num_warps": launch.num_warps})


def read_binary(launch: Launch, target: str) -> Binary:
    """Compile the launch for the target and read registers, spills, access widths and instructions off the result."""
    built = compiled(launch, target)
    name, shared = launch.kernel.__name__, built.metadata.shared
    if target.startswith("gfx"):
        text = built.asm["amdgcn"]
        count = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}

        def widest(kind: str) -> int:
            words = re.findall(rf"(?:global|buffer)_{kind}_(dwordx[234]|dword|\w+)", text)
            return max((32 * int(w[-1]) if w[-1] in "234" else 32 if w == "dword" else 16 for w in words), default=0)

        spills = 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"])
        fp64, atomics = len(re.findall(r"\bv_\w+_f64", text)), len(re.findall(r"_atomic_", text))
        return Binary(name, count["vgpr_count"], spills, shared, widest("load"), widest("store"), fp64, atomics)
    text = built.asm["ptx"]

    def bits(kind: str) -> int:
        found = re.findall(rf"\b{kind}\.global[\w:.]*?(?:\.v(\d))?\.[a-z](\d+)\b", text)
        return max((int(v or 1) * int(b) for v, b in found), default=0)

    registers, stack = _resources(built.asm["cubin"])
    fp64, atomics = len(re.findall(r"\.f64\b", text)), len(re.findall(r"\b(?:atom|red)\.", text))
    return Binary(name, registers, stack, shared, bits("ld"), bits("st"), fp64, atomics)


def programs_in_flight(built: Binary, num_warps: int, target: str) -> int:
    """Programs of a launch that one of DEVICES runs at a time, by its warps and registers (given out 8 a thread at a time)."""
    threads = 32 * num_warps
    by_registers = 65536 // (threads * -(-built.registers // 8) * 8)
    return DEVICES[target][0] * min(by_registers, 64 // num_warps)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack and local bytes) of the one kernel in a cubin, by the cuobjdump of the triton wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])

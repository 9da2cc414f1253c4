"""What the Triton kernels compile to, without a GPU.

Launches are recorded on tensors without storage, compiled for each architecture, and the binaries
read with the tools inside the triton wheel.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastlm.kernels.common import cdiv

TARGETS = {
    **{f"sm_{n}": ("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)},
    "gfx942": ("hip", "gfx942", 64),
}
# Multiprocessors and bytes of L2 cache of an A100, an H100 and a B200: 64 warps and 65,536
# registers to a multiprocessor.
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
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int


@dataclass(frozen=True)
class Binary:
    """What one compiled launch is made of.

    Widths are of the widest global access, in bits; spills in bytes a thread.
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    fp64: int
    atomics: int


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, the owner's attribute of that name is function.

    For Triton's own classes, which have no other way to look at a launch without making it.
    """
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


def record(call: Callable[[], object]) -> list[Launch]:
    """The launches that call() would make; nothing runs."""
    found: list[Launch] = []

    def run(
        kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **kwargs: Any
    ) -> None:
        names = [p.name for p in kernel.params]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        found.append(Launch(kernel, arguments, grid, num_warps))

    with replaced(JITFunction, "run", run):
        call()
    return found


def compiled(launch: Launch, target: str) -> Any:
    """The launch's kernel compiled for one of TARGETS.

    Its arguments are specialised as Triton's own launcher does it.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for i, p in enumerate(launch.kernel.params):
        value = launch.arguments[p.name]
        divisible = False
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(value, torch.Tensor):
            signature[p.name] = "*" + NAMES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif p.is_constexpr or not is_number:
            signature[p.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        elif value == 1 and not p.do_not_specialize:
            signature[p.name] = "constexpr"
            constants[(i,)] = 1
        else:
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not p.do_not_specialize
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {"num_warps": launch.num_warps}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def read_binary(launch: Launch, target: str) -> Binary:
    """Compile the launch for the target and read off what the result is made of."""
    built = compiled(launch, target)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return read(launch.kernel.__name__, built)


def _read_amd(name: str, built: Any) -> Binary:
    text = built.asm["amdgcn"]
    counts = re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)
    count = {key: int(value) for key, value in counts}

    def widest(kind: str) -> int:
        words = re.findall(rf"(?:global|buffer)_{kind}_(dwordx[234]|dword|\w+)", text)
        bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
        return max((bits.get(word, 16) for word in words), default=0)

    return Binary(
        kernel=name,
        registers=count["vgpr_count"],
        spills=4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"]),
        shared=built.metadata.shared,
        load_bits=widest("load"),
        store_bits=widest("store"),
        fp64=len(re.findall(r"\bv_\w+_f64", text)),
        atomics=len(re.findall(r"_atomic_", text)),
    )


def _read_nvidia(name: str, built: Any) -> Binary:
    text = built.asm["ptx"]

    def widest(kind: str) -> int:
        found = re.findall(rf"\b{kind}\.global[\w:.]*?(?:\.v(\d))?\.[a-z](\d+)\b", text)
        return max((int(count or 1) * int(bits) for count, bits in found), default=0)

    registers, stack = _resources(built.asm["cubin"])
    return Binary(
        kernel=name,
        registers=registers,
        spills=stack,
        shared=built.metadata.shared,
        load_bits=widest("ld"),
        store_bits=widest("st"),
        fp64=len(re.findall(r"\.f64\b", text)),
        atomics=len(re.findall(r"\b(?:atom|red)\.", text)),
    )


def programs_in_flight(built: Binary, num_warps: int, target: str) -> int:
    """Programs of a launch that one of DEVICES runs at a time, by its warps and registers."""
    threads = 32 * num_warps
    registers = cdiv(built.registers, 8) * 8  # they are given out 8 a thread at a time
    by_registers = 65536 // (threads * registers)
    return DEVICES[target][0] * min(by_registers, 64 // num_warps)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack and local bytes) of a cubin's kernel, by the triton wheel's cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])

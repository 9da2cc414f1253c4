"""A Triton function and its arguments to PTX, as Triton's own launcher does it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler import compile as triton_compile

SIGNATURE = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
DIVISIBLE = [["tt.divisibility", 16]]


def specialise(
    function: Any, arguments: dict[str, Any], assume_aligned: Collection[str]
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """Type, constant value and divisibility of each argument."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for i, parameter in enumerate(function.params):
        name, value = parameter.name, arguments[parameter.name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_one = is_number and value == 1 and isinstance(value, int)
        if parameter.is_constexpr or not (isinstance(value, torch.Tensor) or is_number):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + SIGNATURE[value.dtype]
            if value.data_ptr() % 16 == 0 or name in assume_aligned:
                attributes[(i,)] = DIVISIBLE
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif is_one and not parameter.do_not_specialize:
            signature[name], constants[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = DIVISIBLE
    return signature, constants, attributes


def compile_kernel(
    function: Any, arguments: dict[str, Any], target: int, num_warps: int, num_stages: int,
    assume_aligned: Collection[str],
) -> tuple[CompiledKernel, dict[str, str]]:  # fmt: skip
    """The compiled kernel, and the type of each argument that it still takes, in order."""
    signature, constants, attributes = specialise(function, arguments, assume_aligned)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    kernel = triton_compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return kernel, {name: kind for name, kind in signature.items() if kind != "constexpr"}

"""Number formats: raw bits to numbers and back, with PTX's rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}
UINT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SINT: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOAT: dict[int, Any] = {4: np.float32, 8: np.float64}
FLOATS = ("f32", "f16", "bf16", "f64")
PACKED = {"bf16x2": ("bf16", 2), "f16x2": ("f16", 2), "f32x2": ("f32", 4)}  # format, bytes of one
SMALLEST_NORMAL = np.float32(1.1754944e-38)


def width(kind: str) -> int:
    """Bytes of a PTX type: f32, bf16, s64, b8, ..."""
    return 2 if kind == "bf16" else WIDTH[kind[1:]]


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; a NaN becomes the one that the hardware makes."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Raw bits to numbers of a PTX type; the 16-bit floats come as float32."""
    if kind == "bf16":
        return bf16_to_f32(bits.astype(np.uint16))
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    size = width(kind)
    unsigned = np.ascontiguousarray(bits.astype(UINT[size]))
    if kind[0] == "f":
        return unsigned.view(FLOAT[size])
    return unsigned.view(SINT[size]) if kind[0] == "s" else unsigned


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers to raw bits of a PTX type."""
    values = np.asarray(values)
    if kind == "bf16":
        return f32_to_bf16(values.astype(np.float32))
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    size = width(kind)
    number = FLOAT[size] if kind[0] == "f" else SINT[size] if kind[0] == "s" else UINT[size]
    return np.ascontiguousarray(values.astype(number)).view(UINT[size])


def round_f32(exact: np.ndarray, op: list[str]) -> np.ndarray:
    """float64 to float32 as the opcode says: to nearest, or .rm down, .rp up, .rz to zero."""
    exact = np.asarray(exact, np.float64)
    rounded = exact.astype(np.float32)
    if "rm" in op or "rz" in op:
        too_high = (rounded > exact) & (("rm" in op) | (exact > 0))
        rounded = np.where(too_high, np.nextafter(rounded, np.float32(-np.inf)), rounded)
    if "rp" in op or "rz" in op:
        too_low = (rounded < exact) & (("rp" in op) | (exact < 0))
        rounded = np.where(too_low, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return rounded


def flush(values: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zero with their sign (.ftz)."""
    small = np.abs(values) < SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), values), values)


def saturate(values: np.ndarray) -> np.ndarray:
    """Clamp to 0 to 1; NaN becomes 0 (.sat)."""
    return np.nan_to_num(np.clip(values, 0, 1), nan=0.0)

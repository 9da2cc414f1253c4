"""Answers to PyTorch's questions about a GPU in a build of PyTorch that has no CUDA.

Inductor asks for the device's properties and for Triton's driver while it writes a GPU program.
Here the answers are an H100's; nothing can run on it. Where the CUDA build runs, on a GPU or on the
stand-in of fakegpu/, nothing here is needed. It patches torch inside the `with`: use it in a
process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as interfaces
import triton
from triton.backends.compiler import GPUTarget

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
)


class Driver:
    """In the place of Triton's driver: it names the target and can launch nothing."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


def cuda_answers(properties: SimpleNamespace) -> dict[str, Any]:
    """What torch.cuda's functions answer."""
    random_state = torch.zeros(16, dtype=torch.uint8, device="cpu")
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *a: properties,
        "get_device_capability": lambda *a: (properties.major, properties.minor),
        "get_device_name": lambda *a: properties.name,
        "is_bf16_supported": lambda *a, **k: properties.major >= 8,
        "_lazy_init": lambda: None,
        "synchronize": lambda *a: None,
        "set_device": lambda *a: None,
        "_exchange_device": lambda *a: 0,
        "_maybe_exchange_device": lambda *a: 0,
        "get_rng_state": lambda *a: random_state.clone(),
        "set_rng_state": lambda *a, **k: None,
    }


def invert(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.bitwise_not.default(tensor)


def copy_from(
    tensor: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
) -> torch.Tensor:
    return torch.ops.aten.copy_.default(tensor, source, non_blocking)


@contextlib.contextmanager
def pretend_gpu(properties: SimpleNamespace = H100) -> Iterator[None]:
    """A GPU with these properties is there as far as anybody asks."""
    capability = 10 * properties.major + properties.minor
    interface = interfaces.CudaInterface
    driver = triton.runtime.driver
    with contextlib.ExitStack() as stack:

        def patch(owner: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))

        for name, answer in cuda_answers(properties).items():
            patch(torch.cuda, name, answer)
        for owner in (interface, interface.Worker):
            patch(owner, "get_device_properties", staticmethod(lambda *a: properties))
            patch(owner, "current_device", staticmethod(lambda: 0))
        patch(interface, "is_available", staticmethod(lambda: True))
        patch(interface, "get_compute_capability", staticmethod(lambda *a: capability))
        patch(torch.version, "cuda", "13.0")
        # Python's bindings of these two take a real device guard; the operators do not.
        patch(torch.Tensor, "__invert__", invert)
        patch(torch.Tensor, "copy_", copy_from)
        before = driver._active
        driver.set_active(Driver(capability))
        try:
            yield
        finally:
            driver._active = before

"""The stand-in GPU by itself, called as PyTorch's CUDA build calls it.

What that build makes of it is shown by check_fakegpu.py, in the environment of `make rehearse`.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from ctypes import byref, c_char_p, c_int, c_long, c_size_t, c_uint, c_void_p
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parent / "fakegpu"
OUT_OF_MEMORY, CAPTURE_FORBIDS_IT = 2, 900
TO_DEVICE, TO_HOST, BY_POINTERS = 1, 2, 4
GIB = 1 << 30

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc, which builds it, is absent")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    file = tmp_path_factory.mktemp("fakegpu") / "standin.so"
    sources = map(str, sorted(SOURCES.glob("*.c")))
    flags = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fPIC", "-shared"]
    subprocess.run(["gcc", *flags, "-o", str(file), *sources, "-ldl", "-lpthread"], check=True)
    return ctypes.CDLL(str(file))


@pytest.fixture
def counted(library) -> Callable[[], dict[str, int]]:
    """What was counted since the last call, without zeros."""
    function = library.fakegpu_count
    function.restype = c_char_p
    last: dict[str, int] = {}

    def since() -> dict[str, int]:
        value, now = c_long(), {}
        while name := function(len(now), byref(value)):
            now[name.decode()] = value.value
        found = {name: n - last.get(name, 0) for name, n in now.items() if n != last.get(name, 0)}
        last.update(now)
        return found

    since()
    return since


@pytest.fixture
def stream(library) -> Iterator[c_void_p]:
    handle = c_void_p()
    assert library.cudaStreamCreate(byref(handle)) == 0
    return handle


def allocate(library, size: int, function: str = "cudaMalloc", *flags: c_uint) -> c_void_p:
    pointer = c_void_p()
    assert getattr(library, function)(byref(pointer), c_size_t(size), *flags) == 0
    return pointer


@pytest.mark.parametrize(
    ("device", "capability", "name"),
    [("h100", (9, 0), b"H100"), ("a100", (8, 0), b"A100"), ("t4", (7, 5), b"T4")],
)
def test_it_is_the_device_that_was_chosen(library, monkeypatch, device, capability, name):
    monkeypatch.setenv("FAKEGPU_DEVICE", device)
    text, value = ctypes.create_string_buffer(64), c_int()
    library.cuDeviceGetName(text, 64, 0)
    assert name in text.value
    found = []
    for attribute in (75, 76):  # compute capability, major and minor
        library.cudaDeviceGetAttribute(byref(value), attribute, 0)
        found.append(value.value)
    assert tuple(found) == capability


def test_any_size_fits_until_the_device_is_full(library):
    free, total = c_size_t(), c_size_t()
    big = allocate(library, 60 * GIB)
    library.cudaMemGetInfo(byref(free), byref(total))
    assert total.value - free.value == 60 * GIB
    more = c_void_p()
    assert library.cudaMalloc(byref(more), c_size_t(30 * GIB)) == OUT_OF_MEMORY
    assert library.cudaFree(big) == 0
    library.cudaMemGetInfo(byref(free), byref(total))
    assert free.value == total.value


def test_copies_are_counted_and_bring_zeros_to_the_host(library, counted, stream):
    device, pinned = allocate(library, 16), allocate(library, 16, "cudaHostAlloc", c_uint(0))
    counted()
    host = ctypes.create_string_buffer(b"something", 16)
    size = c_size_t(16)
    library.cudaMemcpyAsync(device, host, size, TO_DEVICE, stream)
    assert counted() == {"copies to the device": 1, "copies of unpinned memory": 1}
    library.cudaMemcpyAsync(pinned, device, size, TO_HOST, stream)
    assert counted() == {"copies to the host": 1}
    library.cudaMemcpy(host, device, size, BY_POINTERS)
    assert host.raw == bytes(16)
    expected = {"copies to the host": 1, "copies of unpinned memory": 1, "stream syncs": 1}
    assert counted() == expected
    source = ctypes.create_string_buffer(b"between hosts", 16)
    library.cudaMemcpy(host, source, size, BY_POINTERS)
    assert host.raw == source.raw


def test_triton_is_refused_a_pointer_to_ordinary_memory(library):
    host, device, value = ctypes.create_string_buffer(16), allocate(library, 16), c_size_t()
    ask = library.cuPointerGetAttribute
    ask.argtypes = c_void_p, c_int, c_size_t
    device_pointer = 3
    assert ask(byref(value), device_pointer, device.value) == 0
    assert value.value == device.value
    assert ask(byref(value), device_pointer, ctypes.addressof(host)) != 0


class Dim3(ctypes.Structure):
    _fields_ = (("x", c_uint), ("y", c_uint), ("z", c_uint))


def launch(library, kernel: object, stream: c_void_p | None = None) -> None:
    one = Dim3(1, 1, 1)
    assert library.cudaLaunchKernel(kernel, one, one, None, c_size_t(0), stream) == 0


def launches_by_name(library) -> dict[str, int]:
    function = library.fakegpu_kernel
    function.restype = c_long
    name, launches, at, found = c_char_p(), c_long(), 0, {}
    while (at := function(c_long(at), byref(name), byref(launches))) >= 0:
        found[name.value.decode()] = launches.value
    return found


def test_launches_are_counted_by_the_kernels_names(library, counted):
    kernels = [ctypes.create_string_buffer(8) for _ in range(20_000)]  # the table has to grow
    names = [ctypes.create_string_buffer(f"kernel{i}".encode()) for i in range(len(kernels))]
    register = getattr(library, "__cudaRegisterFunction")
    for kernel, name in zip(kernels, names, strict=True):
        register(None, kernel, None, name, *[None] * 6)
    launch(library, kernels[7])
    launch(library, kernels[7])
    launch(library, kernels[19_999])
    assert counted()["ATen launches"] == 3
    found = launches_by_name(library)
    assert {k: n for k, n in found.items() if k.startswith("kernel")} == {
        "kernel7": 2,
        "kernel19999": 1,
    }


def test_captured_work_runs_when_the_graph_does(library, counted, stream):
    assert library.cudaStreamBeginCapture(stream, 0) == 0
    other, event, kernel = c_void_p(), c_void_p(), ctypes.create_string_buffer(8)
    library.cudaStreamCreate(byref(other))
    library.cudaEventCreate(byref(event))
    library.cudaEventRecord(event, stream)
    library.cudaStreamWaitEvent(other, event, 0)  # draws the other stream into the capture
    launch(library, kernel, stream)
    launch(library, kernel, other)
    graph, executable = c_void_p(), c_void_p()
    assert library.cudaStreamEndCapture(stream, byref(graph)) == 0
    assert counted() == {}
    library.cudaGraphInstantiate(byref(executable), graph, ctypes.c_ulonglong(0))
    library.cudaGraphLaunch(executable, stream)
    library.cudaGraphLaunch(executable, stream)
    assert counted() == {"graph launches": 2, "kernels in graphs": 4}
    launch(library, kernel, other)
    assert counted() == {"ATen launches": 1}


def test_waiting_inside_a_capture_is_refused_as_on_a_gpu(library, counted, stream):
    graph = c_void_p()
    library.cudaStreamBeginCapture(stream, 0)
    assert library.cudaStreamSynchronize(stream) == CAPTURE_FORBIDS_IT
    assert library.cudaDeviceSynchronize() == CAPTURE_FORBIDS_IT
    library.cudaStreamEndCapture(stream, byref(graph))
    assert counted() == {}
    assert library.cudaStreamSynchronize(stream) == 0
    assert library.cudaDeviceSynchronize() == 0
    assert counted() == {"stream syncs": 1, "device syncs": 1}

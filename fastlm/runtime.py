"""What a run runs on: the device, its dtype and speed, compiling, the processes, memory."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastlm.errors import UserError

# Dense bf16 matmuls with fp32 accumulation, FLOP/s, by the name that the driver gives a GPU. Data
# sheets give most NVIDIA figures with sparsity, which is twice as much.
PEAKS = {
    "A100": 312e12,  # NVIDIA A100 data sheet
    "H100": 989e12,  # NVIDIA H100 data sheet: SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,  # NVIDIA H200 data sheet: SXM
    "H200 NVL": 835e12,
    "GH200": 989e12,  # NVIDIA GH200 data sheet
    "H20": 148e12,  # NVIDIA H20 data sheet
    "B200": 2250e12,  # NVIDIA Blackwell data sheet: HGX B200
    "GB200": 2500e12,  # the same: one GPU of a GB200 NVL72
    "A10": 125e12,  # NVIDIA A10 data sheet
    "A10G": 70e12,  # NVIDIA A10G, as Amazon lets it
    "L4": 121e12,  # NVIDIA L4 data sheet
    "L40S": 362e12,  # NVIDIA L40S data sheet
    "RTX A6000": 155e12,  # NVIDIA RTX A6000 data sheet
    "RTX 3090": 71e12,  # NVIDIA Ampere GA102 white paper
    "RTX 4090": 165e12,  # NVIDIA Ada white paper
    "RTX 5090": 209.5e12,  # NVIDIA RTX Blackwell white paper
    "MI250X": 191.5e12,  # AMD Instinct MI250X data sheet: 383 for two devices
    "MI300X": 1307e12,  # AMD Instinct MI300X data sheet
}
# Parameters of the largest model whose compiled training step is replayed: a larger one keeps the
# GPU busy for longer than the host needs to launch it, and its activations would stay in memory.
GRAPH_PARAMETERS = 32_000_000
STATUS = Path("/proc/self/status")


def pick_device(name: str) -> torch.device:
    """The device of a name: auto (the GPU when there is one), cpu, cuda, or cuda:N.

    A GPU named by its number becomes the current one, because Triton launches its kernels there.
    Raises UserError for another name and for a GPU that is not there.
    """
    number = re.fullmatch(r"cuda(?::(\d+))?", name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device(name)
    if number is None:
        raise UserError(f"device is {name!r}; choose among auto, cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        mend = "pass --device cpu, or install a CUDA build of torch"
        raise UserError(f"device is {name}, but PyTorch sees no GPU here; {mend}")
    if number[1] is not None:
        gpus = torch.cuda.device_count()
        if int(number[1]) >= gpus:
            raise UserError(f"device is {name}, but the last GPU here is cuda:{gpus - 1}")
        if launched():
            mend = "under torchrun each process takes a GPU of its own; pass --device cuda"
            raise UserError(f"device is {name}, but {mend}")
        torch.cuda.set_device(int(number[1]))
    return torch.device(name)


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matmuls under autocast(): bf16 or fp16 on a GPU, fp32 on a CPU.

    Most CPUs are slower in bf16 than in fp32. GPUs without bf16 (T4, V100) emulate it, slowly.
    """
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def autocast(device: torch.device) -> torch.autocast:
    """The context in which matmuls run in matmul_dtype()."""
    dtype = matmul_dtype(device)
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)


def set_deterministic(wanted: bool, device: torch.device) -> None:
    """Make a GPU compute the same bits on every run from here on, or no longer; a CPU always does.

    PyTorch's own operators, attention among them, then add up in a fixed order or raise an error,
    and torch.compile chooses block sizes without measuring. Our kernels never do otherwise. To be
    called before the first matmul.
    """
    if device.type != "cuda" or wanted == torch.are_deterministic_algorithms_enabled():
        return
    # PyTorch insists on it, and cuBLAS reads it once
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # nothing is read that was not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted)


@contextmanager
def tf32_matmuls(wanted: bool, device: torch.device) -> Iterator[None]:
    """Inside, where wanted, a GPU multiplies fp32 matrices in TF32: 10 bits of mantissa, fp32 sums.

    Raises UserError on a device that has no TF32.
    """
    if not wanted:
        yield
        return
    if device.type != "cuda" or not torch.cuda.is_tf32_supported():
        needed = "an NVIDIA GPU of the year 2020 or newer (compute capability 8.0)"
        raise UserError(f"--tf32 needs {needed}; device is {device}; leave --tf32 out")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def compiled(
    function: Callable[..., Tensor], device: torch.device, options: dict[str, Any] | None = None
) -> Callable[..., Tensor]:
    """torch.compile with static shapes, as one graph; options are Inductor's.

    Raises UserError on a CPU without a C++ compiler.
    """
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        mend = "install g++, or leave --compile out"
        raise UserError(f"--compile on a CPU needs a C++ compiler, and none was found; {mend}")
    if torch.__version__ < "2.13":
        declare_own_ops_to_inductor()
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def replays_graphs(model: nn.Module, device: torch.device) -> bool:
    """Whether a model's compiled training step is replayed as CUDA graphs: small, on a GPU."""
    size = sum(p.numel() for p in model.parameters())
    return device.type == "cuda" and size <= GRAPH_PARAMETERS


def compiled_in_graphs(
    function: Callable[..., Tensor],
    device: torch.device,
    model: nn.Module,
) -> Callable[..., Tensor]:
    """compiled(), its forward and backward pass each recorded as a CUDA graph and replayed.

    What a pass returns, gradients included, lies in the graphs' memory, which the next pass
    overwrites. Gradients that are to be added up over passes therefore move to memory of their own
    before the second pass. A batch is copied to where the first one of its shapes was: the backward
    graph reads some of it there, and would be recorded again for another place.
    """
    forward = compiled(function, device, {"triton.cudagraphs": True})
    parameters = list(model.parameters())
    moved = False
    places: dict[tuple[int, torch.Size], Tensor] = {}

    def in_place(batch: Any) -> Any:
        leaves, form = tree_flatten(batch)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                key = number, leaf.shape
                if key not in places:
                    places[key] = torch.empty_like(leaf)
                leaves[number] = places[key].copy_(leaf)
        return tree_unflatten(leaves, form)

    def replayed(*args: Any, **options: Any) -> Tensor:
        nonlocal moved
        kept = [p for p in parameters if p.grad is not None]
        if not kept:
            moved = False
        elif not moved:
            for p in kept:
                p.grad = p.grad.clone()  # type: ignore[union-attr]
            moved = True
        args, options = in_place((args, options))
        torch.compiler.cudagraph_mark_step_begin()
        return forward(*args, **options)

    return replayed


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that replays step, which is recorded here as a CUDA graph; on a CPU, step itself.

    step must have run before, so that nothing is compiled now, and must do the same work on the
    same tensors every time.
    """
    if device.type != "cuda":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def read_later(tensor: Tensor, device: torch.device) -> Callable[[], list]:
    """A function that gives the tensor's values as they are now.

    Called later, it does not wait for what was launched in between: on a GPU the values are copied
    to pinned memory as soon as they are there, and an event behind the copy tells when.
    """
    if device.type != "cuda":
        values = tensor.tolist()
        return lambda: values
    # pinned: PyTorch makes it so for a copy that nobody waits for
    copied = tensor.to("cpu", non_blocking=True)
    event = torch.cuda.Event(blocking=True)
    event.record()

    def read() -> list:
        event.synchronize()
        return copied.tolist()

    return read


def declare_own_ops_to_inductor() -> None:
    """Tell Inductor before it compiles that our ops have no lowering and are called as they are.

    It would find out by itself, but before torch 2.13 it then writes a log message that prints the
    op's inputs, and theirs in turn: from four layers on that takes longer than anyone waits. As
    there, an op gets its inputs in the strides that they have in eager mode.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op_name = name.partition("::")
        if namespace != "fastlm":
            continue
        packet = getattr(torch.ops.fastlm, op_name.partition(".")[0])
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if op not in lowerings:
                strides = tag_to_layout_constraint(get_layout_constraint_tag(op))
                make_fallback(op, strides, warn=False)


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def ranks() -> tuple[int, int]:
    """This process's number and how many there are: torchrun's, once the command joined them."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large matmul on this device now: the best of the repetitions that fit."""
    n = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state stays as it is
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
    a @ a
    best = float("inf")
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        a @ a
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_of(name: str) -> float | None:
    """The data sheet's peak of a GPU, FLOP/s: of the longest name in PEAKS that its own holds."""
    if "Laptop" in name:  # another chip under the same number
        return None
    whole_words = r"(?<![A-Za-z0-9]){}(?![A-Za-z0-9])"
    found = [key for key in PEAKS if re.search(whole_words.format(key), name)]
    return PEAKS[max(found, key=len)] if found else None


def ceiling(device: torch.device) -> tuple[float, str]:
    """FLOP/s to compare with, and its name: the data sheet's peak (MFU), else the measured rate."""
    peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is not None:
        return peak, "MFU"
    return matmul_rate(device, matmul_dtype(device)), "of matmul rate"


def peak_gib(device: torch.device) -> float:
    """Most memory in use so far: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return process_peak_gib()


def process_peak_gib() -> float:
    """Most memory that this process has held, GiB.

    On Linux VmHWM of /proc/self/status: ru_maxrss, taken elsewhere, starts there at what the parent
    held when it forked.
    """
    if STATUS.is_file():
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    unit = 2 ** (30 if sys.platform == "darwin" else 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def free_bytes(device: torch.device) -> int:
    """Memory that is free now; on a system that does not count its RAM, as if there were plenty."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    counted = all(name in os.sysconf_names for name in names)
    return os.sysconf(names[0]) * os.sysconf(names[1]) if counted else 1 << 40

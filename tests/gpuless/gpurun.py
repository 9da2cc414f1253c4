"""Run the GPU program of a compiled training step on the CPU.

    from gpurun import run_for_gpu
    report, stats = run_for_gpu(step, build)  # report.result: the loss; gradients on the leaves

gpucompile writes the forward and backward programs; here they run as they are, on CPU tensors.
Every generated Triton kernel is compiled to PTX with Inductor's own first configuration and
executed by ptxsim, with its checks of memory and races and its counts. Extern calls (matmuls,
attention, custom ops) take PyTorch's CPU operators. So a wrong Inductor kernel, a race or an access
out of bounds in the compiled program shows without a GPU. Keep it tiny: some thousand tokens times
channels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch._inductor.runtime import triton_heuristics

from gpucompile import compile_for_gpu
from gpureport import Graph, Report
from pretend_gpu import H100
from ptxsim import Stats, simulate

Statistics = defaultdict[str, list[Stats]]

# What turns a program for a GPU into one for CPU tensors.
SUBSTITUTIONS = {
    r"empty_strided_cuda\(": "empty_strided_cpu(",
    r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream$":
        "get_raw_stream = lambda device: None",
    r"with torch\.cuda\._DeviceGuard\(0\):": "with contextlib.nullcontext():",
    r"torch\.cuda\.set_device\(0\)": "pass",
    r"^async_compile = AsyncCompile\(\)$": "async_compile = simulated",
    r"device\(type='cuda', index=0\)|torch\.device\('cuda:?0?'\)": "torch.device('cpu')",
}  # fmt: skip


class SimulatedKernel:
    """A generated kernel with Inductor's own choice of block sizes; .run launches it in ptxsim."""

    def __init__(self, name: str, source: str, folder: Path, stats: Statistics, target: int):
        found: dict[str, Any] = {}

        def capture(
            size_hints: Any, configs: list, triton_meta: dict, inductor_meta: dict, **rest: Any
        ) -> Callable:
            found.update(config=configs[0], triton=triton_meta, inductor=inductor_meta)
            return lambda function: function

        path = folder / f"{name}.py"
        path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with mock.patch.object(triton_heuristics, "cached_autotune", capture):
            spec.loader.exec_module(module)
        self.name = name
        self.function = getattr(module, name)
        self.stats = stats
        self.config = found["config"]
        self.constants = found["triton"].get("constants", {})
        self.options = {
            "target": target,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }
        meta = found["inductor"]
        self.grid = getattr(triton_heuristics, meta["grid_type"])(inductor_meta=meta)
        self.grid.generate(dict(self.config.kwargs))

    def run(self, *args: Any, stream: Any = None, **ignored: Any) -> None:
        named = dict(self.constants)
        given = iter(args)
        for parameter in self.function.params:
            name = parameter.name
            if name in self.config.kwargs:
                named[name] = self.config.kwargs[name]
            elif name not in named:
                named[name] = next(given)
        grid = tuple(int(size) for size in self.grid.eval_slow(dict(named)))
        self.stats[self.name].append(simulate(self.function, grid, **self.options, **named))


def executor(folder: Path, stats: Statistics, target: int) -> Callable[[Graph], Callable]:
    """A function that makes a graph callable on CPU tensors."""

    def triton(name: str, source: str, device_str: str = "", **options: Any) -> SimulatedKernel:
        return SimulatedKernel(name, source, folder, stats, target)

    simulated = SimpleNamespace(triton=triton, wait=lambda scope: None)

    def make(graph: Graph) -> Callable:
        code = graph.code
        for pattern, replacement in SUBSTITUTIONS.items():
            code = re.sub(pattern, replacement, code, flags=re.MULTILINE)
        scope: dict[str, Any] = {
            "__name__": f"program_{graph.which}",
            "simulated": simulated,
            "contextlib": contextlib,
        }
        exec(compile(code, f"<{graph.which}>", "exec"), scope)

        def boxed(args: list) -> Any:
            return scope["call"](list(args))

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    return make


def run_for_gpu(
    step: Callable[..., Any], build: Callable[[], tuple], properties: SimpleNamespace = H100
) -> tuple[Report, dict[str, list[Stats]]]:
    """Compile step(*build()) and its backward for a GPU and run both on the CPU.

    Returns the report (result: the loss) and the statistics of each kernel's launches.
    """
    stats: Statistics = defaultdict(list)
    target = 10 * properties.major + properties.minor
    with tempfile.TemporaryDirectory() as folder:
        execute = executor(Path(folder), stats, target)
        report = compile_for_gpu(step, build, properties, execute)
    return report, dict(stats)

"""See what torch.compile would make of a model for a GPU, without a GPU.

    from gpucompile import compile_for_gpu
    report = compile_for_gpu(step, build)   # build() -> inputs; step(*inputs) -> a scalar loss
    print(report.table())

Dynamo, AOTAutograd and Inductor run for real on fake tensors, which have no storage: a 7B model
costs nothing. What comes back (gpureport.py): the generated program of the forward and the backward
graph, every Triton kernel in it, the extern calls with their sizes and FLOPs, and a projection of
the step's time from bytes and FLOPs. A graph break or a host sync is an error (fullgraph). A
projection is never a measurement: launch gaps, caches and clocks are not in it.

Where the CUDA build of PyTorch has a GPU, a real one or the stand-in of fakegpu/, tensors are
traced on cuda and every question about the device is answered by it: attention appears as the CUDA
operator that PyTorch chooses, with its FLOPs. Where there is only the CPU build, graphs are traced
on the CPU and then moved to "cuda", and the answers come from pretend_gpu.py: attention appears as
its CPU operator, without FLOPs, to be read as one attention call. DEVICE says which it is; build()
and step() take it where they name a device.

It patches torch while it runs: use it in a process of its own. Checked with the CPU build of torch
2.13 with triton 3.9, and with the CUDA build of torch 2.11 with triton 3.6.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

from gpureport import Graph, Report, extern_nodes, read_wrapper, saved_bytes
from pretend_gpu import H100, pretend_gpu

GPU = torch.device("cuda", 0)
DEVICE = GPU if torch.cuda.is_available() else torch.device("cpu")


class Stop(Exception):
    """Inductor has written its code; nothing is to be built or loaded."""


def as_cuda(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Move a graph traced on the CPU to the GPU, in place; returns its inputs, moved.

    Inputs, constants, recorded values and device arguments become cuda. The CPU build of PyTorch
    cannot run autograd on fake CUDA tensors, so that the graph had to be traced on the CPU.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with getattr(value, "fake_mode", None) or contextlib.nullcontext():
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)

    for node in gm.graph.nodes:
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": GPU}
        node.args = tuple(GPU if isinstance(arg, torch.device) else arg for arg in node.args)
        if node.op == "get_attr" and isinstance(getattr(gm, node.target, None), torch.Tensor):
            setattr(gm, node.target, move(getattr(gm, node.target)))
        if "val" in node.meta:
            node.meta["val"] = torch.utils._pytree.tree_map(move, node.meta["val"])
    gm.recompile()
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [
        node.meta.get("val", value) for node, value in zip(placeholders, inputs, strict=True)
    ]  # fmt: skip


def written_program(
    gm: torch.fx.GraphModule, inputs: Sequence[Any], backward: bool
) -> tuple[str, int]:
    """Inductor's code for a graph, and the bytes that its generated kernels take and give."""
    code, size = "", 0

    def stop(lowering: GraphLowering) -> None:
        nonlocal code, size
        written = lowering.codegen()[0]
        code = str(getattr(written, "value", written))  # a text with its line numbers, or a text
        nodes = [node for node in lowering.scheduler.nodes if not node.is_extern()]
        size = int(sum(node.get_read_write_buffers_sizes() for node in nodes))
        raise Stop

    with torch.no_grad(), mock.patch.object(GraphLowering, "compile_to_module", stop):
        try:
            compile_fx_inner(gm, inputs, is_backward=backward)
        except Exception as error:
            if "Stop" not in f"{type(error).__name__} {error!r}":  # Inductor wraps it
                raise
    return code, size


def compile_for_gpu(
    step: Callable[..., Any],
    build: Callable[[], tuple],
    properties: SimpleNamespace = H100,
    execute: Callable[[Graph], Callable] | None = None,
) -> Report:
    """Compile step(*build()) and its backward pass for a GPU.

    build makes the inputs and the model, under fake tensors: sizes cost nothing. properties: of the
    GPU, where only the CPU build is there. execute makes a Graph callable on CPU tensors, as in
    gpurun.py: build() then makes real ones there, whatever the build, and the programs run on them.
    Raises what torch.compile raises: a graph break, an operator without a fake kernel.
    """
    report = Report()
    on_cuda = DEVICE.type == "cuda" and execute is None

    def compiler(which: str) -> Callable:
        def compile_graph(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
            original = copy.deepcopy(gm).forward  # goes on, so that the backward is traced
            moved = inputs if on_cuda else as_cuda(gm, inputs)
            code, size = written_program(gm, moved, which == "backward")
            graph = read_wrapper(which, code)
            graph.generated_bytes = size
            graph.nodes = extern_nodes(gm)
            if which == "forward":
                graph.saved_bytes = saved_bytes(gm)
            report.graphs.append(graph)
            return make_boxed_func(original) if execute is None else execute(graph)

        return compile_graph

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )
    # it would report the Stop as an error, with a folder of what it has written so far
    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        if DEVICE.type == "cpu":
            stack.enter_context(pretend_gpu(properties))
        if execute is None:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1))
        torch._dynamo.reset()
        with DEVICE if on_cuda else contextlib.nullcontext():
            inputs = build()
        report.result = torch.compile(step, backend=backend, fullgraph=True)(*inputs)
        if isinstance(report.result, torch.Tensor) and report.result.requires_grad:
            report.result.backward()
    return report

"""A compiled GPU program, taken apart: kernels, launches, extern calls, bytes and FLOPs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

KERNEL = re.compile(
    r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''',", re.DOTALL | re.MULTILINE
)
LAUNCH = re.compile(r"^\s+(triton_\w+)\.run\(", re.MULTILINE)
EXTERN = re.compile(r"(?:extern_kernels\.(\w+)|torch\.ops\.([\w.]+))\(")


class Extern(NamedTuple):
    """One call of an operator that PyTorch did not write a kernel for: a matmul, a custom op."""

    name: str
    input_bytes: int
    output_bytes: int
    flops: int  # 0 where PyTorch has no formula for it


@dataclass
class Graph:
    """One compiled graph, forward or backward.

    kernels: generated Triton kernels, name to source. launches: how often the program calls each.
    externs: the same for all other operators. nodes: those of them that are matmuls, attention or
    custom ops, one by one. generated_bytes: inputs and outputs of the generated kernels, each once.
    saved_bytes: what a forward graph hands to the backward one beside its own inputs.
    """

    which: str
    code: str
    kernels: dict[str, str]
    launches: Counter[str]
    externs: Counter[str]
    nodes: list[Extern] = field(default_factory=list)
    generated_bytes: int = 0
    saved_bytes: int = 0

    def line(self) -> str:
        saved = f", {self.saved_bytes / 1e9:.3f} GB saved for the backward"
        return (
            f"{self.which}: {len(self.kernels)} generated kernels, "
            f"{self.launches.total()} launches of them, {self.externs.total()} extern calls, "
            f"{self.generated_bytes / 1e9:.3f} GB through generated kernels"
            + (saved if self.saved_bytes else "")
        )


@dataclass
class Report:
    """All graphs of a step; result: what the step returned (without values, unless it was run)."""

    graphs: list[Graph] = field(default_factory=list)
    result: Any = None

    def kernels(self) -> dict[str, str]:
        return {f"{g.which}:{name}": text for g in self.graphs for name, text in g.kernels.items()}

    def projected_ms(self, tb_s: float = 3.0, tflop_s: float = 700.0) -> dict[str, float]:
        """Lower bounds: generated kernels by bytes, extern calls by bytes or FLOPs, and the sum."""

        def extern_ms(node: Extern) -> float:
            moved = node.input_bytes + node.output_bytes
            return max(moved / tb_s / 1e9, node.flops / tflop_s / 1e9)

        generated = sum(g.generated_bytes for g in self.graphs) / tb_s / 1e9
        externs = sum(extern_ms(node) for g in self.graphs for node in g.nodes)
        return {"generated kernels": generated, "extern calls": externs, "sum": generated + externs}

    def custom_ops(self) -> dict[str, list[int]]:
        """[calls, bytes in and out] of operators that are not PyTorch's: a project's own.

        What such an operator moves inside is not seen.
        """
        found: dict[str, list[int]] = {}
        own = [node for g in self.graphs for node in g.nodes if not node.name.startswith("aten.")]
        for node in own:
            row = found.setdefault(node.name, [0, 0])
            row[0] += 1
            row[1] += node.input_bytes + node.output_bytes
        return found

    def table(self) -> str:
        lines = []
        for g in self.graphs:
            externs = ", ".join(f"{name} x{n}" for name, n in g.externs.most_common(12))
            lines += [g.line(), f"   {externs}"]
        for name, (calls, size) in sorted(self.custom_ops().items()):
            lines.append(f"custom op {name}: {calls} calls, {size / 1e9:.3f} GB in and out")
        times = ", ".join(f"{name} {ms:.3f}" for name, ms in self.projected_ms().items())
        return "\n".join([*lines, f"projection, ms (3.0 TB/s, 700 TFLOP/s): {times}"])


def read_wrapper(which: str, code: str) -> Graph:
    """Kernels, launches and extern calls of a generated program."""
    body = code[code.rindex("def call(") :]
    externs = Counter(a or b for a, b in EXTERN.findall(body))
    return Graph(which, code, dict(KERNEL.findall(code)), Counter(LAUNCH.findall(body)), externs)


def tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def extern_nodes(gm: torch.fx.GraphModule) -> list[Extern]:
    """The matmuls, attention and custom ops of a traced graph."""
    found = []
    for node in gm.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        own = getattr(node.target, "namespace", "aten") not in ("aten", "prims")
        if node.op != "call_function" or packet is None or not (own or packet in flop_registry):
            continue
        args, kwargs = torch.utils._pytree.tree_map(value_of, (node.args, node.kwargs))
        out = node.meta.get("val")
        flops = flops_of(packet, args, kwargs, out)
        found.append(Extern(str(node.target), tensor_bytes(list(args)), tensor_bytes(out), flops))
    return found


def flops_of(packet: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of a call by PyTorch's formulas; 0 where there is none."""
    if packet not in flop_registry:
        return 0
    try:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    except AssertionError:  # grouped-query attention: torch 2.11's formula wants as many key heads
        return 0


def value_of(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, torch.fx.Node) else argument


def saved_bytes(gm: torch.fx.GraphModule) -> int:
    """Bytes of a forward graph's results (of views their whole storage) that are not its inputs."""
    output = next(iter(gm.graph.find_nodes(op="output")))
    results = [node for node in output.args[0] if isinstance(node, torch.fx.Node)]
    storages = dict.fromkeys(map(storage_of, results))
    return sum(tensor_bytes(node.meta.get("val")) for node in storages if node.op != "placeholder")


def storage_of(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose storage this one is a view of."""
    while getattr(node.target, "is_view", False):
        (node, *_) = node.all_input_nodes
    return node

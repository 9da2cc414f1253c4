"""Clipping and the optimizers in one GPU step, counted without storage: bytes, FLOPs, launches.

Each operation that PyTorch is asked for counts with what it reads and writes, each tensor once; a
kernel of our own with kernels/triton/updates.py's PASSES, which a test counts. A pass over a list
is as many launches as PyTorch makes of it.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BANDWIDTH = 3.0e12  # bytes/s
MATMULS = 700e12  # FLOP/s
FOREACH_ELEMENTS = 320 * 65536  # of one launch of a pass over a list: 320 blocks of 65,536
WRITTEN_ONLY = ("copy_", "zero_", "fill_", "_foreach_zero_")


@dataclass
class Part:
    """Counts of one part of a step.

    matmul_s: each matmul at its own bound, by FLOPs or by bytes.
    """

    traffic: float = 0.0
    launches: int = 0
    matmuls: int = 0
    flops: float = 0.0
    matmul_s: float = 0.0

    def count(self, size: float, launches: int = 1) -> None:
        self.traffic += size
        self.launches += launches

    def count_matmul(self, size: float, flops: float) -> None:
        self.matmuls += 1
        self.flops += flops
        self.matmul_s += max(size / BANDWIDTH, flops / MATMULS)

    @property
    def ms(self) -> float:
        return 1e3 * (self.traffic / BANDWIDTH + self.matmul_s)


def size_of(value: Any) -> int:
    """Bytes of the tensors in it: an expanded one has those that it is expanded from."""
    found = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return sum(t.untyped_storage().nbytes() if 0 in t.stride() else t.nbytes for t in found)


class Counting(TorchDispatchMode):
    """Counts every operation inside into a part."""

    def __init__(self, part: Part):
        super().__init__()
        self.part = part

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        packet = function.overloadpacket
        if (
            function.is_view
            or function.namespace == "prim"
            or name.startswith(("empty", "new_empty", "detach", "_unsafe"))
        ):
            return out
        given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        written = [
            a.name
            for a in function._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        read = [
            key
            for key in given
            if key not in written or (key != "out" and name not in WRITTEN_ONLY)
        ]
        made = [given[key] for key in written if key in given] or out
        size = size_of([given[key] for key in read]) + size_of(made)
        if packet in flop_registry:
            flops = flop_registry[packet](
                *args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=out
            )
            if name in ("baddbmm", "addmm") and kwargs.get("beta", 1) != 0:
                self.part.count(
                    2 * size_of(args[0])
                )  # PyTorch copies what is added to where the result will be
            self.part.count_matmul(size, flops)
        else:
            lists = [
                value
                for value in args
                if isinstance(value, list) and value and isinstance(value[0], Tensor)
            ]
            blocks = (
                sum(-(-t.numel() // 65536) for t in lists[0])
                if lists and name.startswith(("_foreach", "_fused"))
                else 1
            )
            self.part.count(size, -(-blocks // 320))
        return out


@contextlib.contextmanager
def own_kernels(part: Part) -> Iterator[None]:
    """Inside, launches of kernels/triton/updates.py are counted and not made."""
    from fastlm.kernels.triton import updates

    def launch(kernel, lists, **arguments):
        name = getattr(kernel, "fn", kernel).__name__
        part.count(updates.PASSES[name] * sum(t.numel() for t in next(iter(lists.values()))))

    class Clip:
        def __getitem__(self, grid):
            return lambda *, partials, found, **options: part.count(partials.nbytes + found.nbytes)

    nothing = mock.patch.object(
        updates, "on_device", lambda values, dtype, device: torch.empty(len(values), device=device)
    )
    with (
        nothing,
        mock.patch.object(updates, "launch", launch),
        mock.patch.object(updates, "clip_kernel", Clip()),
    ):
        yield


def count(config) -> dict[str, Part]:
    """Clipping, Muon and AdamW of a model's step, at the default options of pretraining."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fastlm.config import OptimConfig
    from fastlm.model import Transformer
    from fastlm.train import loop
    from fastlm.train.optim import make_optimizers

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    parts: dict[str, Part] = {}
    with FakeTensorMode():
        parameters = {
            name: nn.Parameter(torch.empty(shape, device="cuda")) for name, shape in shapes.items()
        }
        for p in parameters.values():
            p.grad = torch.empty(p.shape, device="cuda")
        model: Any = types.SimpleNamespace(
            named_parameters=parameters.items, parameters=parameters.values
        )
        optimizers = make_optimizers(model, OptimConfig())
        part = parts["clip"] = Part()
        with own_kernels(part), Counting(part):
            clipping = loop.clip(model, 1.0)
        for optimizer in optimizers:
            part = parts[type(optimizer).__name__] = Part()
            with own_kernels(part), Counting(part):
                optimizer.step(1.0, clipping.factor)
    return parts


if __name__ == "__main__":
    from fastlm.config import PRESETS

    for name, part in count(PRESETS["modern-253m"]).items():
        print(name, part, f"{part.ms:.2f} ms")

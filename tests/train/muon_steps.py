"""Steps of Muon in each process that torchrun started.

Each writes its matrices, and how many it orthogonalised a step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fastlm.train import optim

if __name__ == "__main__":
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 24), (40, 16), (16, 24), (16, 24), (7, 9), (7, 9)]
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    muon = optim.Muon([{"params": matrices, "lr": 0.02, "weight_decay": 0.1}], momentum=0.9)
    here, counts = optim.orthogonalise, []

    def counted(stacks: list[torch.Tensor]) -> list[torch.Tensor]:
        counts.append(sum(map(len, stacks)))
        return here(stacks)

    optim.orthogonalise = counted
    for _ in range(4):
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=generator)
        muon.step()
    done = {"matrices": [p.detach() for p in matrices], "orthogonalised": counts[-1]}
    torch.save(done, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()

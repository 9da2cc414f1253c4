"""Runs fastlm commands, a JSON list in a file, one after the other in each process that torchrun
started.

What the second process builds or opens is spoiled: a run must start from the first one's
parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastlm.cli import main
from fastlm.model import Transformer
from fastlm.train import packed, parallel, pretrain


def spoiled(make: Callable[..., Any]) -> Callable[..., Any]:
    """make, whose model gets other parameters in every process but the first."""

    def run(*args: Any, **options: Any) -> Any:
        made = make(*args, **options)
        model = made if isinstance(made, Transformer) else made[0]
        with torch.no_grad():
            for p in model.parameters():
                p += dist.get_rank()
        return made

    return run


if __name__ == "__main__":
    parallel.join("gloo", 10)
    pretrain.build = spoiled(pretrain.build)
    packed.open_model = spoiled(packed.open_model)
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        assert main(command) == 0, command
        dist.barrier()  # what the first wrote last is there for the next command
    dist.destroy_process_group()

"""Runs fastlm commands, a JSON list in a file, one after the other in each process that torchrun started."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from fastlm.cli import main

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        assert main(command) == 0, command
        dist.barrier()  # what the first wrote last is there for the next command
    dist.destroy_process_group()

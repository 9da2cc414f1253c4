"""counted.py as the only process of torchrun, through DistributedDataParallel or FSDP2.

NCCL brings a CUDA runtime of its own, which refuses the stand-in's driver; PyTorch's fake backend
stands in for it: it is asked for every collective and moves nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

from counted import run
from fastlm.train import parallel

join = parallel.join


def join_without_nccl(backend: str, timeout_minutes: float) -> object:
    return join(backend.replace("nccl", "fake"), timeout_minutes)


if __name__ == "__main__":
    with mock.patch.object(parallel, "join", join_without_nccl):
        found = run(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(found["exit"])

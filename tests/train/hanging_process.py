"""A stage in which one process hangs while it reads data."""

from __future__ import annotations

import sys
import time

from fastlm import cli
from fastlm.config import PretrainConfig
from fastlm.train import parallel


@parallel.under_torchrun
def stage(cfg: PretrainConfig) -> int:
    parallel.note("reads the rows of step 7")
    if not parallel.is_main_process():
        time.sleep(600)
    return parallel.all_reduce_max(0)[0]


if __name__ == "__main__":
    cli.COMMANDS["pretrain"] = cli.COMMANDS["pretrain"]._replace(function="__main__:stage")
    sys.exit(cli.main(["pretrain", "--device", "cpu", "--timeout-minutes", "0.1"]))

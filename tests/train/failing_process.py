"""A stage in which one process meets a mistake while the others wait for it."""

from __future__ import annotations

import sys

from fastlm import cli
from fastlm.config import PretrainConfig
from fastlm.errors import UserError
from fastlm.train import parallel


@parallel.under_torchrun
def stage(cfg: PretrainConfig) -> int:
    if not parallel.is_main_process():
        raise UserError("only the second process knows")
    return parallel.all_reduce_max(0)[0]


if __name__ == "__main__":
    cli.COMMANDS["pretrain"] = cli.COMMANDS["pretrain"]._replace(function="__main__:stage")
    sys.exit(cli.main(["pretrain", "--device", "cpu"]))

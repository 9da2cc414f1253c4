"""fastlm kernels: what every Triton kernel compiles to, moves and would take at least."""

from __future__ import annotations

import json

from fastlm.config import KernelsConfig
from fastlm.errors import UserError
from fastlm.kernels.audit.report import collect, table


def report(cfg: KernelsConfig) -> int:
    """Print the tables, or JSON."""
    targets = cfg.targets.split(",") if cfg.targets else None
    try:
        found = collect(targets, cfg.against or None)
    except ValueError as e:
        raise UserError(str(e)) from None
    print(json.dumps(found, indent=1) if cfg.json else table(found))
    return 0

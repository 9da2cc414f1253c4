"""Names that parameters had, and the order they stood in, before every norm became a module.

Checkpoints, and hashes of models, that were written then hold the old ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

OLD_ORDER = (
    "embedding",
    "norm",
    "head",
    # in a block
    "attention_norm",
    "q_norm",
    "k_norm",
    "ffn_norm",
    "qkv.weight",
    "qkv.bias",
    "out.weight",
    "gate_up.weight",
    "down.weight",
)


def current_name(name: str) -> str:
    """The name today of a parameter, or of an optimizer's tensor of it: norm -> norm.weight."""
    return re.sub(r"norm(?!\.weight)", "norm.weight", name)


def old_names(names: Iterable[str]) -> dict[str, str]:
    """Old name -> name of each of a model's parameters, in the old order."""
    old = {name.replace("norm.weight", "norm"): name for name in names}

    def place(name: str) -> tuple[int, int]:
        layer, _, inside = name.removeprefix("blocks.").partition(".")
        return (int(layer), OLD_ORDER.index(inside)) if inside else (-1, OLD_ORDER.index(name))

    return {name: old[name] for name in sorted(old, key=place)}

"""The options that the losses share, checked, and flattened for PyTorch's operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossOptions:
    """What the loss of a row depends on beside its logits and its target.

    ignore_index: the target of rows that do not count. z_loss: the weight of lse^2.
    label_smoothing: the share of the loss that is uniform over the vocabulary. softcap: logits
    become softcap tanh(logits / softcap); 0: they stay as they are. vocab_size: columns from there
    on are padding; None: there are none.
    """

    ignore_index: int = -100
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    softcap: float = 0.0
    vocab_size: int | None = None

    def columns(self, width: int) -> int:
        """How many of so many columns are logits."""
        return width if self.vocab_size is None else self.vocab_size

    def check(self, name: str, reduction: str, width: int) -> None:
        """Raise ValueError, with the call's name in front, for an option that makes no sense."""
        if reduction not in REDUCTIONS:
            expected = "'mean', 'sum' or 'none'"
            raise ValueError(f"{name}: reduction is {reduction!r}, expected {expected}")
        if not 0 <= self.label_smoothing <= 1:
            smoothing = self.label_smoothing
            raise ValueError(f"{name}: label_smoothing is {smoothing}, expected 0 to 1")
        if self.softcap < 0:
            expected = "a positive bound, or 0 for none"
            raise ValueError(f"{name}: softcap is {self.softcap}, expected {expected}")
        if not 0 < self.columns(width) <= width:
            expected = f"1 to {width}, the number of columns"
            raise ValueError(f"{name}: vocab_size is {self.vocab_size}, expected {expected}")

    def flat(self) -> list[float]:
        """As an operator's schema takes them: it knows lists of numbers and no dataclass.

        Integers below 2^53 are exact in them.
        """
        vocab_size = -1 if self.vocab_size is None else self.vocab_size
        integers = float(self.ignore_index), float(vocab_size)
        return [*integers, self.z_loss, self.label_smoothing, self.softcap]

    @classmethod
    def of(cls, flat: Sequence[float]) -> LossOptions:
        """The options that flat() was called on."""
        ignore_index, vocab_size, z_loss, label_smoothing, softcap = flat
        return cls(
            ignore_index=int(ignore_index),
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            softcap=softcap,
            vocab_size=None if vocab_size < 0 else int(vocab_size),
        )


def mean_over_counted(total: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """total divided by the number of targets that count; 0 where none does. No host sync."""
    return total / torch.sum(targets != ignore_index).clamp(min=1)

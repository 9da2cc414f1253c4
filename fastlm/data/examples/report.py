"""The examples of a source, and the account of every record that was read for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from fastlm.data.examples.templates import EncodedSequence
from fastlm.data.records import BadRecords


@dataclass
class Report:
    """What became of the records of one source: kept + dropped + bad = read.

    template: how the last of them became text.
    """

    source: str
    read: int = 0
    kept: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    dropped: int = 0
    template: str = ""
    bad: BadRecords = field(default_factory=lambda: BadRecords("fail"))

    def line(self) -> str:
        """One line for the user."""
        text = f"{self.source}: {self.read:,} records read, {self.kept:,} kept"
        counts = {
            "prompts shortened": self.prompts_truncated,
            "responses shortened (their end-of-text is not trained)": self.responses_truncated,
            "dropped (nothing counted is left)": self.dropped,
            "bad": self.bad.count,
        }
        text += "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        return text + (f" (first: {self.bad.examples[0]})" if self.bad.examples else "")


class Examples(NamedTuple):
    """Encoded sequences of a source (two a pair) by split, and the account of its records."""

    train: list[EncodedSequence]
    validation: list[EncodedSequence]
    report: Report

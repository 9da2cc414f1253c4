"""A user's mistake: the exception that stands for it, and the words that its messages share."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: one line, with what was wrong, what was given, what is
    expected, and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """


def check(ok: bool, message: str) -> None:
    """Raise UserError(message) unless ok."""
    if not ok:
        raise UserError(message)


def nearest(word: str, choices: Iterable[str], otherwise: str = "") -> str:
    """The end of an error message: the choice most like word, or else the words given, or all."""
    import difflib  # a third of the time that fastlm --help takes, and no help needs it

    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return otherwise or f"choose among {', '.join(choices)}"


def divisors(n: int) -> list[int]:
    """What a message offers where a number must divide n."""
    return [d for d in range(1, n + 1) if n % d == 0]


def printable(text: str) -> str:
    """The text of a stranger with all that a terminal would act on spelled out: escape sequences,
    line ends."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

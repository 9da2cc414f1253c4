"""The exception that stands for a user's mistake, and what may be shown of a stranger's text."""


class UserError(Exception):
    """A mistake the user can mend, in one line: what, got, expected, and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """


def printable(text: str) -> str:
    """The text with all that a terminal would act on, such as escape sequences, spelled out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

"""The one exception that stands for a user's mistake, and what may be shown of a stranger's text."""


class UserError(Exception):
    """A mistake the user can mend: one line that says what was wrong, what was given, what is expected, and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """


def printable(text: str) -> str:
    """The text with everything that a terminal would act on, such as escape sequences and line ends, spelled out."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

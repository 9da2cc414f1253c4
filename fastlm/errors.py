"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """A mistake the user can mend: one line that says what was wrong, what was given, what is expected, and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """

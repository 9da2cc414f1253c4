"""The two checks that nearly every number in a configuration needs."""

from __future__ import annotations

from fastlm.errors import check


def check_positive(config: object, *names: str, table: str = "") -> None:
    """Raise UserError unless each of these fields is above 0. table: what its name begins with."""
    for name in names:
        value = getattr(config, name)
        wanted = "a positive integer" if isinstance(value, int) else "positive"
        check(value > 0, f"{table}{name} is {value}; it must be {wanted}")


def check_not_negative(config: object, *names: str, table: str = "") -> None:
    """Raise UserError unless each of these fields is 0 or more."""
    for name in names:
        value = getattr(config, name)
        check(value >= 0, f"{table}{name} is {value}; it must not be negative")

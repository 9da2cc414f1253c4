"""JSON values as dataclasses: every field has its type, or one sentence says what is wrong.

A class states what it expects by its annotations: int, float, str, bool, Literal, list[T],
dict[str, T] and other dataclasses. An int is at least 0 and below 2^63, a float is finite. Fields
that a class does not name are passed over, so that a later version may add some.
"""

from __future__ import annotations

import dataclasses
import json
import math
import stat
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastlm.errors import UserError

T = TypeVar("T")

# Of a file: a tokenizer of 256,000 tokens fits, and no JSON of this size takes 500 MB.
MAX_BYTES = 40 << 20


class SchemaError(ValueError):
    """A value is not what its class says: which field, what it holds and what was expected."""


def parse(kind: type[T], value: Any, name: str = "") -> T:
    """The value as `kind`; SchemaError where a field is missing or has another type."""
    return typing.cast(T, _convert(kind, value, name))


def read_json(file: Path, kind: type[T], mend: str) -> T:
    """The JSON object in a file as a dataclass.

    Raises UserError as read_object() does, and where a field is missing or has another type.
    """
    try:
        return parse(kind, read_object(file, mend))
    except SchemaError as error:
        raise UserError(f"{file}: {error}; {mend}") from error


def read_object(file: Path, mend: str) -> dict[str, Any]:
    """The JSON object in a file, whatever its fields hold.

    mend: what a user can do about a damaged file. Raises UserError where the file cannot be read,
    is not a regular file, is larger than MAX_BYTES, or is not a JSON object.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{file}: not a regular file; {mend}")
        if status.st_size > MAX_BYTES:
            size = f"{status.st_size:,} bytes, expected at most {MAX_BYTES:,}"
            raise UserError(f"{file}: {size}; {mend}")
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: unreadable ({error.strerror or error}); {mend}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{file}: unreadable, not JSON ({reason}); {mend}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: got {_shown(value)}, expected a JSON object; {mend}")
    return value


def _convert(kind: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_fields(typing.cast(type, kind), value, name)
    if origin is Literal:
        choices = typing.get_args(kind)
        # 1 == True == 1.0 in Python; they are not the same in JSON.
        same = [choice for choice in choices if type(choice) is type(value) and choice == value]
        return same[0] if same else _refuse(name, value, " or ".join(map(repr, choices)))
    if origin is list:
        if not isinstance(value, list):
            _refuse(name, value, "a list")
        (item,) = typing.get_args(kind)
        return [_convert(item, part, f"{name}[{n}]") for n, part in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            _refuse(name, value, "an object")
        _, item = typing.get_args(kind)
        places = [f"{name}.{ascii(key)[1:-1][:40]}" for key in value]
        parts = zip(value.items(), places, strict=True)
        return {key: _convert(item, part, place) for (key, part), place in parts}
    if kind is str:
        return _text(value, name)
    if kind is bool:
        return value if isinstance(value, bool) else _refuse(name, value, "true or false")
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # The comparison comes first: a whole number may be too large to be a float.
        if number and abs(value) <= 1e300 and math.isfinite(value):
            return float(value)
        _refuse(name, value, "a finite number")
    assert kind is int, f"{name}: a field of type {kind}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and 0 <= value < 1 << 63:
        return value
    _refuse(name, value, "a whole number from 0 to 2^63 - 1")


def _convert_fields(kind: type, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        _refuse(name, value, "an object")
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        place = f"{name}.{field.name}" if name else field.name
        if field.name in value:
            values[field.name] = _convert(hints[field.name], value[field.name], place)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"no field {place}, expected one")
    return kind(**values)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        _refuse(name, value, "text")
    return typing.cast(str, value)


def _refuse(name: str, value: Any, expected: str) -> typing.NoReturn:
    raise SchemaError(f"field {name or 'at the top'}: got {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    """The value in at most 60 characters."""
    if isinstance(value, int) and abs(value) >= 1 << 70:
        return "a number of many digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""A value is what its class says, or one sentence tells which field is not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.schema import MAX_BYTES, SchemaError, parse, read_json


@dataclass(frozen=True)
class Inner:
    count: int
    names: list[str]


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", 1]
    ratio: float
    sure: bool
    parts: dict[str, Inner]
    note: str = ""
    more: list[Inner] = field(default_factory=list)


GOOD = {"kind": "a", "ratio": 0.5, "sure": True, "parts": {"x": {"count": 3, "names": ["n"]}}}


def test_what_is_written_is_read_back():
    outer = Outer(1, 2.5, False, {"x": Inner(3, ["a", "b"])}, "note", [Inner(0, [])])
    assert parse(Outer, json.loads(json.dumps(asdict(outer)))) == outer
    assert parse(Outer, GOOD | {"later": [{}]}) == Outer("a", 0.5, True, {"x": Inner(3, ["n"])})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "field at the top: got None, expected an object"),
        ([], "field at the top: got [], expected an object"),
        ({k: v for k, v in GOOD.items() if k != "ratio"}, "no field ratio, expected one"),
        (GOOD | {"kind": "b"}, "field kind: got 'b', expected 'a' or 1"),
        (GOOD | {"kind": True}, "field kind: got True, expected 'a' or 1"),
        (GOOD | {"kind": 1.0}, "field kind: got 1.0, expected 'a' or 1"),
        (GOOD | {"ratio": "1"}, "field ratio: got '1', expected a finite number"),
        (GOOD | {"ratio": True}, "field ratio: got True, expected a finite number"),
        (GOOD | {"ratio": float("nan")}, "field ratio: got nan, expected a finite number"),
        (
            GOOD | {"ratio": 10**400},
            "field ratio: got a number of many digits, expected a finite number",
        ),
        (GOOD | {"sure": 1}, "field sure: got 1, expected true or false"),
        (GOOD | {"note": 5}, "field note: got 5, expected text"),
        (GOOD | {"note": "\udcff"}, "field note: got '\\udcff', expected text"),
        (GOOD | {"more": {}}, "field more: got {}, expected a list"),
        (GOOD | {"more": [{"count": 1}]}, "no field more[0].names, expected one"),
        (GOOD | {"parts": []}, "field parts: got [], expected an object"),
        (
            GOOD | {"parts": {"x": {"count": -1, "names": []}}},
            "field parts.x.count: got -1, expected a whole number",
        ),
        (
            GOOD | {"parts": {"x": {"count": 1.0, "names": []}}},
            "field parts.x.count: got 1.0, expected a whole number",
        ),
        (
            GOOD | {"parts": {"x": {"count": 1 << 63, "names": []}}},
            f"got {1 << 63}, expected a whole number",
        ),
        (
            GOOD | {"parts": {"x": {"count": True, "names": []}}},
            "field parts.x.count: got True, expected a whole number",
        ),
        (GOOD | {"parts": {"\x1b[2J\n": 0}}, "field parts.\\x1b[2J\\n: got 0, expected an object"),
        (GOOD | {"note": ["y" * 500]}, "field note: got ['yyyy"),
    ],
)
def test_what_is_wrong_is_named(value, message):
    with pytest.raises(SchemaError) as error:
        parse(Outer, value)
    assert message in str(error.value)
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        # a list or an object
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional={name: JSON for name in (*GOOD, "note", "more")}))
@settings(max_examples=100, deadline=None)
def test_any_json_is_accepted_or_refused_in_one_printable_line(value):
    try:
        outer = parse(Outer, GOOD | value)
    except SchemaError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert parse(Outer, asdict(outer)) == outer
    assert refusal.isprintable()


def test_files_that_are_no_json_objects_are_refused(tmp_path):
    file = tmp_path / "a.json"
    for content in (
        b"",
        b"{",
        b"\xff\xfe{",
        b"[1]",
        b"[" * 100_000,
        b'{"kind": ' + b"1" * 5000 + b"}",
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match="make it again") as error:
            read_json(file, Outer, "make it again")
        assert str(error.value).startswith(str(file))
        assert str(error.value).isprintable()
    for place in (tmp_path, tmp_path / "none", file / "below"):
        with pytest.raises(UserError, match="make it again"):
            read_json(place, Outer, "make it again")
    file.write_text(json.dumps(GOOD))
    assert read_json(file, Outer, "").sure
    with file.open("ab") as stream:
        stream.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match="expected at most"):
        read_json(file, Outer, "make it again")

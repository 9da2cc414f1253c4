"""python-functions: rows that are what they say, split by file, the same on every run."""

from __future__ import annotations

import ast

from fastlm.data.functions import (
    LEAST_CHARACTERS,
    Function,
    cut_functions,
    function_records,
    make_records,
    mutate,
)

SOURCE = '''
import os

class Thing:
    def area(self, width, height):
        """The area
        of it."""
        if width == 0:
            raise ValueError("no width given")
        return width * height

    def no_docstring(self):
        return 1

def outer():
    """Has a function inside."""
    def inner():
        return 1
    return inner
'''


def test_functions_are_cut_after_their_docstring_and_moved_to_the_margin():
    (found,) = cut_functions(SOURCE)
    assert found.head == 'def area(self, width, height):\n    """The area\n    of it."""\n'
    assert found.body.startswith("    if width == 0:\n")
    assert ast.unparse(ast.parse(found.head + found.body)) in ast.unparse(
        ast.parse(SOURCE)
    ).replace("\n    ", "\n")
    assert list(cut_functions("def broken(:\n")) == []


def test_a_mutation_turns_the_lines_round():
    assert mutate("    a = 1\n    b = 2\n    return a\n") == "    return a\n    b = 2\n    a = 1\n"
    assert mutate("    pass\n") == ""


def test_rejected_answers_differ_from_the_chosen_and_half_are_mutations():
    bodies = [f"    total = value + {n}\n    return total, value\n" for n in range(20)]
    rows = make_records(
        [Function(f'def f{n}(value):\n    """Add {n}."""\n', body) for n, body in enumerate(bodies)]
    )
    assert all(row["chosen"] == row["completion"] != row["rejected"] for row in rows)
    assert sum(row["rejected"] in bodies for row in rows) >= 8
    assert sum(row["rejected"] not in bodies for row in rows) == 10


def test_the_standard_library_gives_thousands_of_functions_that_parse():
    rows = function_records()
    assert len(rows["train"]) > 2000
    assert len(rows["validation"]) > 30
    for row in rows["validation"] + rows["train"][::50]:
        function = row["prompt"].removeprefix("Complete this function.\n\n") + row["completion"]
        assert isinstance(ast.parse(function).body[0], ast.FunctionDef)
        assert len(row["completion"]) >= LEAST_CHARACTERS
    assert not {r["completion"] for r in rows["train"]} & {
        r["completion"] for r in rows["validation"]
    }

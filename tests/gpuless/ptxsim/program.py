"""PTX text to a list of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass


class SimulationError(RuntimeError):
    """The program did what a GPU faults on or hangs on, or what this simulator does not know."""


@dataclass(frozen=True)
class Instruction:
    """op: the opcode, split at its dots. args: the operands. guard: (predicate, wanted value)."""

    op: list[str]
    args: list[str]
    guard: tuple[str, bool] | None
    text: str

    @property
    def kind(self) -> str:
        return self.op[0]

    @property
    def type(self) -> str:
        return self.op[-1]


@dataclass(frozen=True)
class Program:
    """One kernel. params: (name, bytes) in order. labels: name to the index of an instruction."""

    params: list[tuple[str, int]]
    code: list[Instruction]
    labels: dict[str, int]


PARAMETER = r"\.param\s+(\.[a-z]\d+)(?:\s+\.ptr[^,)]*?)?\s+(\w+_param_\d+)"
# a label, an instruction with an operand list in braces, or any other statement
STATEMENT = r"[$\w]+:(?!:)|[^;\n{}]*\{[^;\n]*\}[^;\n]*;|[^;\n{}]+;"
DIRECTIVES = (".pragma", ".loc", ".reg", ".shared", ".file", ".section", ".local", ".b8")


def parse(ptx: str) -> Program:
    """The one kernel in this PTX."""
    head = re.search(r"\.entry\s+(\S+?)\(([^)]*)\)", ptx)
    if head is None:
        raise SimulationError("the PTX has no .entry")
    params = [(name, parameter_bytes(kind)) for kind, name in re.findall(PARAMETER, head[2])]
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in re.findall(STATEMENT, without_comments(ptx[ptx.index("{", head.end()) :])):
        line = statement.strip().rstrip(";").strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        elif line.startswith("."):
            if not line.startswith(DIRECTIVES):
                raise SimulationError(f"cannot parse: {line}")
        elif line:
            code.append(instruction(line))
    return Program(params, code, labels)


def parameter_bytes(kind: str) -> int:
    return next((size for bits, size in (("64", 8), ("32", 4), ("16", 2)) if bits in kind), 1)


def without_comments(text: str) -> str:
    """The text without comments and without what stands in quotes."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return re.sub(r'"[^"]*"', '""', text)


def instruction(line: str) -> Instruction:
    guard = None
    if match := re.match(r"@(!?)(%\w+)\s+", line):
        guard = (match[2], not match[1])
        line = line[match.end() :]
    op, _, operands = line.partition(" ")
    return Instruction(op.split("."), split_operands(operands), guard, line)


def split_operands(text: str) -> list[str]:
    """The operands: parts between the commas that stand in no bracket."""
    found: list[str] = []
    depth = 0
    part = ""
    for character in text.strip():
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        if character == "," and depth == 0:
            found.append(part.strip())
            part = ""
        else:
            part += character
    return [*found, part.strip()] if part.strip() else found


def parts(operand: str) -> list[str]:
    """The registers of a vector operand {a, b, ...}; of a single one itself."""
    return [part.strip() for part in operand.strip("{}").split(",")]

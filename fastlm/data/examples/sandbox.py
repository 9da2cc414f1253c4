"""Renders a stranger's chat template, in a process of its own with little time and memory.

    python sandbox.py

The first line of standard input is {"template": TEXT}, each later one the template's variables;
each is answered by one line, {"text": TEXT} or {"error": WORDS}. Jinja's sandbox keeps a template
from the machine; the limits here keep it from taking the machine's time (endless loops) and memory
("x" * 10**10), which no sandbox inside a process can do. Imports nothing but Jinja.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

SECONDS = 2.0  # of processor time, for one text
MEMORY_BYTES = 400 << 20
MAX_CHARACTERS = 20_000_000  # of one text


def limit_memory() -> None:
    """Cap this process's memory, where the system can."""
    with contextlib.suppress(ImportError):  # Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def limit_time(seconds: float) -> None:
    """End this process once it has used so much more processor time (0: never), where it can.

    Nothing less than the signal itself ends a computation inside one operator, such as 9**9**9.
    """
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def compiled(source: str) -> Any:
    """The template as an object of Jinja's."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


def answered(make: Callable[[], str]) -> dict[str, str]:
    """The text, or what went wrong, in one line: a template may raise anything."""
    try:
        text = make()
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        return {"error": words or type(error).__name__}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"it makes a text of more than {MAX_CHARACTERS:,} characters"}
    return {"text": text}


def answers() -> Callable[[dict[str, Any]], dict[str, str]]:
    """A function for the lines: the first compiles the template, the others render it."""
    template: Any = None

    def compile_template(given: dict[str, Any]) -> str:
        nonlocal template
        template = compiled(given["template"])
        return ""

    def answer(given: dict[str, Any]) -> dict[str, str]:
        if template is None:
            return answered(lambda: compile_template(given))
        return answered(lambda: template.render(**given))

    return answer


def main() -> None:
    limit_memory()
    answer = answers()
    for line in sys.stdin:
        limit_time(SECONDS)
        said = answer(json.loads(line))
        limit_time(0)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()

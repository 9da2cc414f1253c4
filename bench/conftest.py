"""Benchmarks: `pytest bench/` runs every case once, small, as a smoke test; `pytest bench/ --benchmark` measures.

Contenders take turns within every round, so that a machine that slows down slows all of them, and ratios are taken round by
round. Results are printed as they come; `--benchmark-json FILE` (pytest-benchmark) keeps them, under extra_info.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from measure import Contender


def pytest_addoption(parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="measure at full size (default: run each case once, small)")


def pytest_configure(config) -> None:
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True


@pytest.fixture(scope="session")
def measuring(request) -> bool:
    return request.config.getoption("--benchmark")


@pytest.fixture
def report(request, benchmark):
    """Notes a row of results: printed at once, kept in the benchmark's extra_info."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")

    def note(**values: float) -> None:
        benchmark.extra_info.update(values)
        terminal.ensure_newline()
        terminal.write_line(f"{request.node.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))

    return note


@pytest.fixture
def take_turns(benchmark, measuring):
    """take_turns(ours, rivals, rounds): seconds of each round, by name ("ours" and the rivals'), or None when not measuring."""

    def run(ours: Callable, rivals: dict[str, Callable], rounds: int, warmup: int = 2) -> dict[str, list[float]] | None:
        if not measuring:
            for contender in (ours, *rivals.values()):
                contender()
            benchmark.pedantic(ours)
            return None
        times: dict[str, list[float]] = {name: [] for name in rivals}

        def let_rivals_run() -> None:
            for name, rival in rivals.items():
                start = time.perf_counter()
                rival()
                times[name].append(time.perf_counter() - start)

        for _ in range(warmup):
            let_rivals_run()
            ours()
        for rounds_of_rival in times.values():
            rounds_of_rival.clear()
        benchmark.pedantic(ours, setup=let_rivals_run, rounds=rounds)
        return {"ours": list(benchmark.stats.stats.data), **times}

    return run


@pytest.fixture
def contender(measuring):
    """contender(name) starts one; all of them end with the test."""
    started: list[Contender] = []

    def start(name: str) -> Contender:
        started.append(Contender(name, small=not measuring))
        return started[-1]

    yield start
    for one in started:
        one.process.stdin.close()
        one.process.wait()

"""`pytest bench/ --benchmark` measures; `pytest bench/` runs every case once, small.

Contenders take turns within every round, so that a machine that slows down slows all of them, and
ratios are taken round by round. Results are printed as they come and kept in
bench/results/<device>-<date>.json (results.py), after every case; `--compare FILE` fails where a
ratio fell since that file was written. `--benchmark-json FILE` is pytest-benchmark's own file.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.harness import results
from bench.harness.contender import Contender

ROWS, PATH, ABOUT, ENDS = (pytest.StashKey() for _ in range(4))


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="measure at full size (default: run each case once, small)",
    )
    parser.addoption(
        "--results",
        metavar="FILE",
        help="where the results go (default: bench/results/<device>-<date>.json)",
    )
    parser.addoption(
        "--compare",
        metavar="FILE",
        help="fail where a ratio fell since this result file was written",
    )
    parser.addoption(
        "--cases",
        metavar="FILE",
        help="write name, group, case and peer of what is collected (bench/scripts/gpu.py)",
    )
    parser.addoption(
        "--stamp",
        metavar="JSON",
        default="{}",
        help="fields that every row gets (bench/scripts/gpu.py)",
    )
    parser.addoption(
        "--seconds",
        type=float,
        default=float("inf"),
        help="begin no further case after so many seconds",
    )


def pytest_configure(config) -> None:
    measuring = config.getoption("--benchmark")
    if not measuring:
        config.option.benchmark_disable = True
    config.addinivalue_line(
        "filterwarnings", "ignore:Benchmark fixture was not used"
    )  # a case may time itself
    config.stash[ROWS] = []
    config.stash[ENDS] = time.monotonic() + config.getoption("--seconds")
    config.stash[ABOUT] = results.machine() | ({} if measuring else {"kind": "rehearsal"})
    given, default = config.getoption("--results"), results.default_path(config.stash[ABOUT])
    config.stash[PATH] = Path(given) if given else default if measuring else None
    if (old := config.getoption("--compare")) and not Path(old).is_file():
        raise pytest.UsageError(f"--compare: no file {old}")


def command(config) -> str:
    return f"python -m pytest {shlex.join(config.invocation_params.args)}"


def keep(config, rows: list[dict]) -> None:
    """Note the rows, and write them at once: a later case may bring the process down."""
    common = {"command": command(config), "date": config.stash[ABOUT]["date"]}
    common |= json.loads(config.getoption("--stamp"))
    rows = [common | row for row in rows]
    config.stash[ROWS] = results.merged(config.stash[ROWS], rows)
    if config.stash[PATH]:
        results.save(config.stash[PATH], config.stash[ABOUT], rows)


def contender_of(item) -> str:
    """The one contender that a test measures, where it does not let several take turns."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("contender", "") if callspec else ""


def place(item) -> dict[str, str]:
    """Group and case of a test: its file's and its own name."""
    return results.place(item.path.stem, item.name, contender_of(item))


def pytest_collection_finish(session) -> None:
    if file := session.config.getoption("--cases"):
        found = [
            {"name": i.nodeid, **place(i), "peer": contender_of(i) or "case"} for i in session.items
        ]
        Path(file).write_text(json.dumps(found), encoding="utf-8")


def pytest_collection_modifyitems(config, items: list[pytest.Item]) -> None:
    """Without a GPU its cases are rehearsed (`make gpu`, or pytest bench/ alone), not measured."""
    import torch

    if config.getoption("--benchmark") and not torch.cuda.is_available():
        gpu = [item for item in items if "kernels_on_device" in item.fixturenames]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_runtest_setup(item) -> None:
    if time.monotonic() > item.config.stash[ENDS]:
        pytest.skip(f"not run: {item.config.getoption('--seconds'):g} seconds were over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A case that fails or does not run is a row too."""
    report = yield
    where = place(item) | {"peer": contender_of(item) or "case"}
    if report.failed:
        keep(item.config, [where | {"failed": call.excinfo.exconly().splitlines()[0][:300]}])
    elif report.skipped:
        keep(item.config, [where | {"missing": str(call.excinfo.value)[:300]}])
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file whose peer is not installed is a row as well."""
    report = yield
    if report.skipped:
        where = {"group": collector.path.stem.removeprefix("test_"), "case": "all", "peer": "case"}
        keep(
            collector.config,
            [where | {"missing": str(report.longrepr[2]).removeprefix("Skipped: ")[:300]}],
        )
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session) -> None:
    old = session.config.getoption("--compare")
    if not old or not session.config.getoption("--benchmark"):
        return
    lines, failed = results.comparison(results.read(Path(old))["rows"], session.config.stash[ROWS])
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    terminal.ensure_newline()
    for line in lines:
        terminal.write_line(f"{old}: {line}")
    if failed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def measuring(request) -> bool:
    return request.config.getoption("--benchmark")


@pytest.fixture
def record(request, benchmark):
    """record(values, unit): rows of contenders that took turns, printed when measuring.

    record(peer="liger", missing=why), or failed=why: a contender that has no figures. measures:
    {contender: {name: number}}, such as tokens per second, kept beside its row; notes: {contender:
    words}; fields: what every row gets; case: a name beside the test's own.
    """

    def add(
        values: dict[str, list[float]] | None = None,
        unit: str = "s",
        case: str = "",
        peer: str = "ours",
        measures: dict[str, dict[str, float]] | None = None,
        notes: dict[str, str] | None = None,
        fields: dict[str, object] | None = None,
        **why: str,
    ) -> None:
        where = place(request.node)
        where["case"] = " / ".join(filter(None, (where["case"], case)))
        rows = results.timed_rows(**where, unit=unit, values=values or {})
        if why or not values:
            rows.append(where | {"peer": peer} | why)
        rows = [row | (fields or {}) for row in rows]
        for row in rows:
            row["measures"] = (measures or {}).get(row["peer"], {})
            if note := (notes or {}).get(row["peer"]):
                row["note"] = note
        benchmark.extra_info.setdefault("rows", []).extend(rows)
        keep(request.config, rows)
        if not request.config.getoption("--benchmark"):
            return
        with request.config.pluginmanager.get_plugin(
            "capturemanager"
        ).global_and_fixture_disabled():
            for row in rows:
                print(f"\n{where['case']}: {results.line(row)}", end="", flush=True)

    return add


@pytest.fixture
def add_measures(request, record):
    """add_measures(name=number, ...): figures of the case's own row, as tokens per second."""

    def note(**values: float) -> None:
        where = place(request.node)
        for row in request.config.stash[ROWS]:
            same_case = (row["group"], row["case"]) == (where["group"], where["case"])
            if same_case and row["peer"] == "ours" and "median" in row:
                measures = row.get("measures", {}) | values
                keep(request.config, [row | {"measures": measures}])
                return
        record(measures={"ours": values})

    return note


@pytest.fixture
def take_turns(benchmark, measuring, record):
    """take_turns(ours, rivals, rounds): seconds of each round, by name.

    The names are "ours" and the rivals'; None when not measuring.
    """

    def run(
        ours: Callable, rivals: dict[str, Callable], rounds: int, warmup: int = 2
    ) -> dict[str, list[float]] | None:
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
        found = {"ours": list(benchmark.stats.stats.data), **times}
        record(found)
        return found

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
        one.end()


@pytest.fixture
def kernels_on_device():
    """Without a GPU, CPU tensors take the Triton kernels, run by Triton's interpreter."""
    import torch

    if torch.cuda.is_available():
        yield
        return
    from fastlm.kernels.common import triton_on_cpu

    with triton_on_cpu():
        yield

"""The file that benchmarks write: what was measured, where, with which versions and command.

A row is one quantity of one contender in one case. It replaces an earlier row of the same group,
case, contender and unit:

    {"group", "case", "peer", "unit", "median", "q10", "q90", "rounds",
     "ratio": {"median", "q10", "q90"}, "measures": {...}}
    {"group", "case", "peer", "missing": why}       a contender that is not installed: never a pass
    {"group", "case", "peer", "failed": why}

Rows of a GPU (bench/scripts/gpu.py) also have "part", "device", "attention", "torch", "triton" and
"run", the time that it began. Their peers are often measured in processes of their own; the ratio
is then that of the medians, from the worst to the best tenth. "note" says in words what a figure
cannot, such as "not checked: rehearsal".

Less is better in every unit. ratio is the contender's value over ours, taken round by round: above
1 ours is better. Where the contender is a ceiling (a copy of as many bytes, the matmuls alone) it
is the share of the ceiling that ours reaches.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "results"
CEILINGS = ("copy", "matmul")
# Medians of ratios move by a tenth from run to run on two busy cores; wider spreads are seen in the
# rounds themselves.
NOISE = 0.15
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "lm-eval",
    "datasets",
)


def summary(values: list[float]) -> dict[str, float]:
    """Median and the tenth and ninetieth percentile."""
    tenths = (
        statistics.quantiles(values, n=10, method="inclusive")
        if len(values) > 1
        else [values[0]] * 9
    )
    return {"median": statistics.median(values), "q10": tenths[0], "q90": tenths[-1]}


def timed_rows(group: str, case: str, unit: str, values: dict[str, list[float]]) -> list[dict]:
    """Rows of contenders that took turns: values by name, one a round.

    The ratio to "ours" round by round.
    """
    rows = []
    for peer, series in values.items():
        row = {
            "group": group,
            "case": case,
            "peer": peer,
            "unit": unit,
            **summary(series),
            "rounds": len(series),
        }
        if peer != "ours" and "ours" in values:
            row["ratio"] = summary(
                [theirs / ours for theirs, ours in zip(series, values["ours"], strict=True)]
            )
        rows.append(row)
    return rows


def ours(row: dict) -> bool:
    """Whether a row is one of ours, or a whole case, which must not be missing; peers may be."""
    return row["peer"] in ("ours", "case") or row["peer"].startswith("ours ")


def with_ratios(rows: list[dict]) -> list[dict]:
    """The rows with a ratio where ours was measured in another process.

    Medians, and the tenths furthest apart.
    """
    measured_ours = {}
    for row in rows:
        if row["peer"] == "ours" and "median" in row:
            measured_ours[case_and_unit(row)] = row
    completed = []
    for row in rows:
        base = measured_ours.get(case_and_unit(row))
        in_one_process = "ratio" in row and "between processes" not in row
        if base and row["peer"] != "ours" and "median" in row and not in_one_process:
            pairs = {"median": "median", "q10": "q90", "q90": "q10"}
            ratio = {name: row[name] / base[other] for name, other in pairs.items()}
            row = row | {"ratio": ratio, "between processes": True}
        completed.append(row)
    return completed


def case_and_unit(row: dict) -> tuple:
    return row["group"], row["case"], row.get("unit", "")


def place(file: str, test: str, contender: str = "") -> dict[str, str]:
    """Group and case of a test, from its file's and its own name.

    contender: the one that it measures alone, if it does.
    """
    group = file.removeprefix("test_")
    name, _, parameters = test.removeprefix("test_").rstrip("]").partition("[")
    if contender:
        parameters = parameters.removesuffix(contender)
    case = f"{name} {parameters}".replace("-", " ").strip()
    return {"group": group, "case": case.removeprefix(group.rstrip("s") + " ").removeprefix("gpu_")}


def line(row: dict) -> str:
    """A row in one line, as it is printed when it is known."""
    words = [row["peer"]]
    words += [f"{why}: {row[why]}" for why in ("missing", "failed") if why in row]
    if "note" in row and "median" not in row:
        words.append(row["note"])
    if "median" in row:
        words.append(f"{row['median']:.4g} {row['unit']} ({row['q10']:.4g} to {row['q90']:.4g})")
    if "ratio" in row:
        what = "ours reaches {:.3f} of it" if row["peer"] in CEILINGS else "{:.3f} times ours"
        words.append(what.format(row["ratio"]["median"]))
    words += [f"{name} {value:.4g}" for name, value in row.get("measures", {}).items()]
    return ", ".join(words)


def key(row: dict) -> tuple:
    return row["group"], row["case"], row["peer"], row.get("unit", "")


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Old rows and new ones, where a new one replaces an old one of its contender.

    A measurement also replaces what was missing or failed, and the other way round.
    """
    without_unit = {(*key(row)[:3], "") for row in new}
    without_figures = {key(row)[:3] for row in new if "missing" in row or "failed" in row}
    kept = {}
    for row in old:
        if key(row) not in without_unit and key(row)[:3] not in without_figures:
            kept[key(row)] = row
    return list((kept | {key(row): row for row in new}).values())


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def save(path: Path, about: dict, rows: list[dict]) -> None:
    """Merge the rows into the file.

    Whoever reads it sees the file before or after, never half of it.
    """
    old = read(path)["rows"] if path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(
        json.dumps({**about, "rows": merged(old, rows)}, indent=1, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    partial.replace(path)


def falls(old: list[dict], new: list[dict], band: float = NOISE) -> list[str]:
    """What became worse: ratios that fell, and contenders that were measured and now fail.

    A ratio fell where its median is below the earlier one by more than the band, and nine in ten
    rounds are below nine in ten of the earlier ones. Only ratios are compared, never times: another
    machine, or the same one busier, has other times and about these ratios.
    """
    before = {key(row): row for row in old}
    measured = {key(row)[:3] for row in old if "median" in row}
    worse = []
    for row in new:
        name = f"{row['case']}, {row['peer']}"
        earlier = before.get(key(row), {})
        if "failed" in row and key(row)[:3] in measured:
            worse.append(f"{name}: measured before, failed now: {row['failed']}")
        elif "ratio" in row and "ratio" in earlier:
            was = earlier["ratio"]["median"]
            now = row["ratio"]["median"]
            if now < (1 - band) * was and row["ratio"]["q90"] < earlier["ratio"]["q10"]:
                worse.append(
                    f"{name}, {row['unit']}: the ratio fell from {was:.2f} to {now:.2f}, "
                    f"by more than {band:.0%}"
                )
    return worse


def comparison(old: list[dict], new: list[dict]) -> tuple[list[str], bool]:
    """(what to print, whether it is a failure): a ratio fell, or there was none to compare."""
    found, known = falls(old, new), {key(row) for row in old if "ratio" in row}
    compared = sum(key(row) in known for row in new if "ratio" in row)
    first = (
        f"{compared} ratios compared, "
        f"{len(known) - compared} of the file's ratios were not taken this time"
    )
    return [first, *found], bool(found) or not compared


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name, with family and model: several generations call themselves AMD EPYC."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if not facts.keys() >= {"model name", "cpu family", "model"}:
        return facts.get("model name") or platform.processor() or platform.machine()
    return f"{facts['model name'].strip()} family {facts['cpu family']} model {facts['model']}"


def commit() -> str:
    """The commit of the source tree, where there is git and a repository."""
    try:
        command = ["git", "-C", FOLDER, "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or "unknown"


def gpu_driver() -> str:
    """The version of NVIDIA's kernel driver, as Linux tells it."""
    info = Path("/proc/driver/nvidia/version")
    found = (
        re.search(r"Module\s+([\d.]+)", info.read_text(encoding="utf-8"))
        if info.is_file()
        else None
    )
    return found.group(1) if found else "unknown"


def machine() -> dict:
    """Hardware, versions and date, as they stand at the top of a result file."""
    import torch

    hardware: dict[str, object] = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    device = f"{hardware['cpu']} {hardware['cpus']} cpus"
    versions = {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := version(p))}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        device = gpu.name
        hardware |= {
            "gpu": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "multiprocessors": gpu.multi_processor_count,
            "capability": f"{gpu.major}.{gpu.minor}",
            "l2_mib": getattr(gpu, "L2_cache_size", 0) / 2**20,
        }
        hardware["driver"] = gpu_driver()
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
    versions["fastlm"] = commit()
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    kind = "measured"
    if hasattr(
        torch, "fakegpu_counts"
    ):  # the stand-in of tests that need no GPU: it computes nothing
        kind, device = "rehearsal", f"a stand-in for {device}"
    return {
        "kind": kind,
        "device": device,
        "date": date,
        "hardware": hardware,
        "versions": versions,
    }


def default_path(about: dict) -> Path:
    """bench/results/<device>-<date>.json; a rehearsal is no result."""
    if about["kind"] == "rehearsal":
        return FOLDER.parent.parent / "build" / "rehearsal.json"
    return (
        FOLDER
        / f"{re.sub('[^a-z0-9]+', '-', about['device'].lower()).strip('-')}-{about['date']}.json"
    )

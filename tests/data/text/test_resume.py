"""A preparation that is killed goes on, and ends with the same bytes, in constant memory."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastlm.data.text.prepare import prepare
from fastlm.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
RUN = """
import sys
from pathlib import Path
from fastlm.data.text import shards, writer
from fastlm.data.catalogue import open_source
from fastlm.data.text.manifest import Settings
from fastlm.runtime import process_peak_gib
from fastlm.tokenizer import load_tokenizer
shards.JOURNAL_EVERY = 4
writer.SHARD_TOKENS = 1 << 20
settings = Settings(on_bad_row="skip", dedup=sys.argv[3])
source = open_source(sys.argv[1], on_bad_row="skip")
shards.write_folder(source, load_tokenizer(), Path(sys.argv[2]), None, settings)
print(round(process_peak_gib() * 1024))
"""


def write_text(file, n_bytes, seed=0):
    """Lines of made-up words: as many different ones as real text has."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(20_000)]
    block = (
        "\n".join(" ".join(rng.choices(vocabulary, k=rng.randint(3, 40))) for _ in range(20_000))
        + "\n"
    )
    with file.open("w") as stream:
        while stream.tell() < n_bytes:
            stream.write(f"= {stream.tell()} =\n")
            stream.write(block[: n_bytes - stream.tell()])
    return file


def command(source, folder, dedup="none"):
    return [sys.executable, "-c", RUN, str(source), str(folder), dedup]


def written(folder):
    try:
        return sum(f.stat().st_size for f in folder.glob("*.bin"))
    except FileNotFoundError:  # renamed since the glob: the run has just ended
        return 0


def killed_many_times(source, folder, dedup, marks):
    """Run, kill -9 when so many bytes are written, again and again, then run to the end."""
    partial, kills = folder.with_name(folder.name + ".partial"), 0
    for mark in marks:
        process = subprocess.Popen(
            command(source, folder, dedup), cwd=ROOT, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and written(partial) < mark:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run(command(source, folder, dedup), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return kills


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "rows"])
def test_killed_at_random_moments_gives_the_same_bytes(tmp_path, kind):
    if kind == "text":
        source, dedup, n_kills = write_text(tmp_path / "a.txt", 4_000_000), "none", 4
    else:
        source, dedup, n_kills = tmp_path / "a.jsonl", "exact", 4
        lines = re.split(r"\n", write_text(tmp_path / "a.txt", 3_000_000).read_text())
        rows = [
            json.dumps({"text": "\n".join(lines[n : n + 5])}) for n in range(0, len(lines) - 5, 5)
        ]
        for n in range(0, len(rows), 500):
            rows[n] = "{"  # bad rows, left out and counted
        rows[1000:1010] = rows[10:20]
        source.write_text("\n".join(rows))
    subprocess.run(
        command(source, tmp_path / "whole", dedup), cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    rng = random.Random(1)
    marks = sorted(rng.uniform(0, written(tmp_path / "whole")) for _ in range(n_kills))
    kills = killed_many_times(source, tmp_path / "again", dedup, marks)
    assert kills >= n_kills // 2
    assert content(tmp_path / "again") == content(tmp_path / "whole")
    if kind == "rows":
        manifest = json.loads((tmp_path / "again" / "manifest.json").read_text())
        assert manifest["bad_rows"]["count"] > 5
        assert manifest["duplicates"]["exact"] >= 10


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    peaks = []
    for size in (1_000_000, 10_000_000):
        source = write_text(tmp_path / f"{size}.txt", size)
        done = subprocess.run(
            command(source, tmp_path / f"out{size}"),
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(done.stdout))
    # The text grows by 9 MB, as ids in lists by 100 MB or more; what may grow once are the
    # tokenizer's and reader's buffers.
    assert peaks[1] - peaks[0] < 12
    assert peaks[1] < 1000


def test_any_number_of_workers_writes_the_same_bytes(tmp_path):
    source = write_text(tmp_path / "a.txt", 2_000_000)
    tokenizer = load_tokenizer()
    folders = [prepare(str(source), tokenizer, tmp_path / str(n), workers=n).folder for n in (1, 3)]
    assert content(folders[0]) == content(folders[1])


def test_two_processes_that_prepare_the_same_text_both_get_it(tmp_path):
    source = write_text(tmp_path / "a.txt", 1_000_000)
    processes = [
        subprocess.Popen(command(source, tmp_path / "out"), cwd=ROOT, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.txt", "out"]

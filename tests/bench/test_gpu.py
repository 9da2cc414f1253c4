"""`make gpu` without a GPU: its budget and exit codes, the parts' rehearsal, the lines that only a GPU runs."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import sys
import time
import venv
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import BENCH, ROOT, python, row
from packaging.requirements import Requirement

from fastlm import bench_report

sys.path.insert(0, str(BENCH))

import gpu
import results
import test_gpu_gate
from harness import gpu_profile, gpu_stage, gpu_timing, stand_ins, words

# ---------------------------------------------------------------- parts, budget, exit codes


def test_every_gpu_benchmark_belongs_to_a_part():
    files = [file for group in gpu.PARTS.values() for file in group]
    assert sorted(files) == sorted(f"bench/{file.name}" for file in BENCH.glob("test_gpu_*.py"))


def case(peer: str, name: str = "step") -> dict[str, str]:
    test = f"bench/test_gpu_train.py::test_gpu_{name}[{peer}]"
    return {"name": test, "group": "gpu_train", "case": name, "peer": peer}


def measured(milliseconds: float) -> dict[str, Any]:
    return {"unit": "ms", "median": milliseconds, "q10": milliseconds, "q90": milliseconds, "rounds": 1}


@pytest.fixture
def train(tmp_path, monkeypatch) -> Callable[..., tuple[int, dict[str, dict]]]:
    """Part train on invented cases: answers by peer, each (exit code of its process, what its rows hold)."""
    path, about = tmp_path / "gpu.json", results.machine()

    def call(answers: dict[str, tuple[int | None, list[dict]]], *arguments: str) -> tuple[int, dict[str, dict]]:
        cases = [case(peer) for peer in answers]

        def run(options: list[str], seconds: float) -> tuple[int | None, str]:
            mine = next(one for one in cases if one["name"] == options[0])
            stamp = json.loads(options[options.index("--stamp") + 1])
            code, rows = answers[mine["peer"]]
            where = {key: mine[key] for key in ("group", "case", "peer")}
            results.save(path, about, [stamp | where | found for found in rows])
            return code, "its last words"

        monkeypatch.setattr(gpu, "run", run)
        monkeypatch.setattr(gpu, "collect", lambda part, file: cases)
        monkeypatch.setattr(gpu, "rehearsing", lambda: False)  # there, the cases of a file share a process
        monkeypatch.setattr(results, "machine", lambda: about)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "train", "--results", str(path), *arguments])
        code = gpu.main()
        return code, {found["peer"]: found for found in results.read(path)["rows"]}

    return call


def test_a_part_passes_where_all_of_ours_is_there_and_names_what_it_ran_on(train):
    code, rows = train({"ours": (0, [measured(2.0)]), "peer": (0, [measured(3.0)])})
    assert code == 0
    assert rows["peer"]["ratio"] == {"median": 1.5, "q10": 1.5, "q90": 1.5}
    for found in rows.values():
        assert found["command"] == "python bench/gpu.py --part train"
        assert found["torch"] == torch.__version__
        assert found["attention"].startswith("rows: ")
        assert {"device", "triton", "run", "part", "date"} <= set(found)


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (-11, "exit code -11, and no row: its last words"),
        (None, "did not end within"),
        (0, "exit code 0, and no row: its last words"),
    ],
)
def test_a_process_that_leaves_no_row_is_a_failure_of_its_contender_alone(train, exit_code, words):
    code, rows = train({"ours": (exit_code, []), "peer": (0, [measured(3.0)])})
    assert code == 1
    assert words in rows["ours"]["failed"]
    assert rows["peer"]["median"] == 3.0
    code, rows = train({"ours": (0, [measured(2.0)]), "peer": (exit_code, [])})
    assert code == 0, "a peer may be missing"
    assert words in rows["peer"]["failed"]
    assert rows["ours"]["median"] == 2.0


def test_a_crash_after_the_figures_of_ours_is_a_failure_and_keeps_them(train):
    code, rows = train({"ours": (-11, [measured(2.0)]), "peer": (-11, [measured(3.0)])})
    assert code == 1
    assert rows["ours"]["median"] == 2.0
    assert "exit code -11" in rows["case"]["failed"]
    assert rows["peer"]["median"] == 3.0


def test_what_the_time_did_not_reach_is_missing_and_only_ours_makes_the_exit_code(train):
    code, rows = train({"ours": (0, [measured(2.0)])}, "--seconds", "1")
    assert code == 1
    assert rows["ours"]["missing"] == "not run: 1 seconds were over"
    code, rows = train({"peer": (0, [measured(2.0)])}, "--seconds", "1")
    assert code == 0
    assert rows["peer"]["missing"] == "not run: 1 seconds were over"


def test_rows_of_an_earlier_call_neither_pass_nor_fail_a_later_one(train):
    assert train({"ours": (0, [{"failed": "out of memory"}])})[0] == 1
    code, rows = train({"ours AdamW": (0, [measured(2.0)])})
    assert code == 0
    assert rows["ours"]["failed"] == "out of memory"
    assert train({"ours": (0, [])})[0] == 1


def test_ours_must_be_there_and_peers_may_be_missing():
    assert all(results.ours({"peer": peer}) for peer in ("ours", "ours AdamW", "case"))
    assert not any(results.ours({"peer": peer}) for peer in ("liger", "plain PyTorch compiled", "copy", "ourselves"))


def test_a_peer_that_fails_fails_a_rehearsal_alone(monkeypatch):
    rows = [{"peer": "liger", "failed": "a bug here"}, {"peer": "trl", "missing": "not installed"}, row("ours", 1.0)]
    monkeypatch.setattr(gpu, "rehearsing", lambda: True)
    assert gpu.wrong_rows(rows) == rows[:1]
    monkeypatch.setattr(gpu, "rehearsing", lambda: False)
    assert not gpu.wrong_rows(rows)


def test_a_rehearsal_does_not_go_into_the_results_nor_another_device_into_a_file(tmp_path):
    about = {"device": "a GPU", "kind": "rehearsal"}
    assert "a rehearsal is no result" in gpu.unfit(results.FOLDER / "gpu.json", about)
    assert not gpu.unfit(tmp_path / "gpu.json", about)
    results.save(tmp_path / "gpu.json", {"device": "another GPU", "kind": "rehearsal"}, [])
    assert "holds results of another GPU (rehearsal)" in gpu.unfit(tmp_path / "gpu.json", about)
    done = python("bench/gpu.py", "--part", "gate", "--results", results.FOLDER / "gpu.json", cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not (results.FOLDER / "gpu.json").exists()


def test_a_contender_in_a_process_of_its_own_has_the_case_of_ours():
    ours = results.place("test_gpu_train", "test_gpu_step[ours]", "ours")
    assert ours == {"group": "gpu_train", "case": "step"}
    peer = "attention: torch, FlashAttention"
    assert results.place("test_gpu_train", f"test_gpu_step[{peer}]", peer) == ours
    assert results.place("test_gpu_tuning", "test_gpu_tuning[sft-ours]", "ours")["case"] == "sft"
    assert results.place("test_gpu_gate", "test_gpu_gradients[packed]")["case"] == "gradients packed"
    assert results.place("test_gpu_kernels", "test_gpu_kernel[rope-4096x1024-both]")["case"] == "rope 4096x1024 both"


def test_ratios_between_processes_are_of_medians_and_their_spread_is_the_widest():
    ours = row("ours", 2.0) | {"q10": 1.0, "q90": 4.0}
    peer = row("peer", 6.0) | {"q10": 5.0, "q90": 8.0}
    other = row("peer", 6.0, 7.0, case="other")
    found = results.with_ratios([ours, peer, other])
    assert found[1]["ratio"] == {"median": 3.0, "q10": 1.25, "q90": 8.0}
    assert found[2] == other
    faster = results.with_ratios([row("ours", 1.0), *found[1:]])
    assert faster[1]["ratio"]["median"] == 6.0, "made again where ours was measured again"


def test_the_short_table_has_ours_its_rate_the_ratios_and_what_is_missing():
    rows = [
        row("ours", 113.0, measures={"tokens_per_second": 290000.0, "mfu": 0.47, "waits": 0}),
        row("peer", 226.0, 2.0),
        {"group": "g", "case": "c", "peer": "liger", "missing": "not installed"},
        {"group": "g", "case": "d", "peer": "liger", "missing": "not installed"},
        {"group": "g", "case": "gradients", "peer": "ours", "measures": {"worst": 0.25}},
    ]
    table = bench_report.short_table(rows)
    assert "113 s   290,000 tokens/s, 0.470 MFU, peer 2.00×" in table
    assert "missing liger, 2 times: not installed" in table
    assert "0.250 worst" in table


# ---------------------------------------------------------------- rehearsal


ENOUGH = ("torch", "triton", "numpy", "pytest", "pytest-benchmark")


def with_requirements(names: Iterable[str]) -> set[str]:
    """The packages and all that they need themselves."""
    found: set[str] = set()
    for name in names:
        if name not in found:
            found.add(name)
            needed = (Requirement(line) for line in metadata.requires(name) or [])
            here = [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
            found |= with_requirements(n for n in here if n not in found)
    return found


def bare_python(folder: Path) -> Path:
    """A Python whose only packages are those that `make gpu` may ask for."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for package in with_requirements(ENOUGH):
        distribution = metadata.distribution(package)
        for name in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / name).exists():  # nvidia/, which many share
                (site / name).symlink_to(Path(str(distribution.locate_file(name))))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_fastlm_s_own_loop_with_nothing_but_torch_triton_numpy_and_pytest(tmp_path):
    """Pretraining to its end, its checkpoint and SFT from it, in a Python without any other package."""
    out = tmp_path / "gpu.json"
    bare = bare_python(tmp_path / "bare")
    done = python("bench/gpu.py", "--part", "train", "--only", "[ours]", "--results", out, cwd=ROOT, executable=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["kind"] == "rehearsal"
    rows = {found["peer"]: found for found in found["rows"]}
    assert rows["ours"]["median"] > 0
    assert rows["ours"]["stand_ins"] == ["rich", "safetensors"]
    steps = [step for step, _ in rows["ours"]["loss"]]
    assert steps == [6]
    assert rows["ours"]["validation_loss"] > 0
    assert rows["Hugging Face Llama compiled"]["missing"] == "transformers is not installed"
    assert rows["attention flash"]["missing"] == "flash needs a GPU"
    tuning = ("bench/gpu.py", "--part", "tuning", "--only", "[sft-plain", "--results", out)
    done = python(*tuning, cwd=ROOT, executable=bare)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_and_their_tests_rehearsed(tmp_path):
    out = tmp_path / "gpu.json"
    for part, only in (("kernels", "swiglu-4096x4096-both"), ("tests", "test_swiglu")):
        done = python("bench/gpu.py", "--part", part, "--only", only, "--results", out, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = {(found["case"], found["peer"]): found for found in json.loads(out.read_text())["rows"]}
    assert rows["swiglu 4096x4096 both", "inductor"]["ratio"]["median"] > 0
    assert rows["swiglu 4096x4096 both", "ours"]["measures"]["gb"] == 2 * 3 * 128 * 8 / 1e9
    assert rows["swiglu 4096x4096 both", "copy"]["measures"]["share_of_copy"] == 1
    tests = rows["test_swiglu.py", "ours"]["measures"]
    assert tests["failed"] == 0
    assert tests["passed"] >= 30
    assert f"tests: {tests['passed']:.0f} passed, 0 failed" in done.stdout


BROKEN = """
import peers.gpu
def broken(op, given):
    raise RuntimeError("no such kernel image")
peers.gpu.liger, peers.gpu.absent = broken, lambda package, module: ""
"""


def test_a_contender_that_fails_is_recorded_and_the_others_are_measured(tmp_path):
    (tmp_path / "with_a_broken_peer.py").write_text(BROKEN, encoding="utf-8")
    out = tmp_path / "now.json"
    done = python("-m", "pytest", "-q", "-p", "with_a_broken_peer", "bench/test_gpu_kernels.py", "-k", "swiglu-4096x4096-both",
                  "--results", out, cwd=ROOT, PYTHONPATH=os.pathsep.join([str(tmp_path), str(BENCH)]))  # fmt: skip
    assert done.returncode == 0, done.stdout
    rows = {r["peer"]: r for r in json.loads(out.read_text())["rows"]}
    assert rows["liger"]["failed"] == "RuntimeError: no such kernel image"
    assert {peer for peer, r in rows.items() if "median" in r} == {"ours", "eager", "inductor", "copy"}
    assert "FAILED swiglu 4096x4096 both, liger: RuntimeError" in bench_report.short_table(list(rows.values()))


# ---------------------------------------------------------------- what a run is watched with


def invented_steps(n: int) -> Iterator[tuple[list, int, dict]]:
    for _ in range(n):
        yield [], 4, {"tokens": 4}


def test_the_steps_after_the_warm_up_are_timed_and_the_run_ends_after_the_last(monkeypatch):
    seen, done, actions, now = gpu_stage.Seen(), [], [], [0.0]
    monkeypatch.setattr(gpu_stage, "on_gpu", lambda: False)
    monkeypatch.setattr(gpu_stage, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watched = gpu_stage.watched_steps(invented_steps(100), seen, 5, True, 2, {3: lambda: actions.append(len(done))})
    with contextlib.suppress(gpu_stage.Enough):
        for step in watched:
            done.append(step)
            now[0] += 0.25 * len(done)
    assert len(done) == 5
    assert actions == [3], "before step number 3"
    assert seen.tokens == [4, 4, 4]
    assert seen.milliseconds == [750, 1000, 1250]


def test_what_is_compiled_after_the_first_step_is_counted():
    @torch.compile(backend="eager", dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def run(lengths: list[int]) -> int:
        torch._dynamo.reset()
        seen = gpu_stage.Seen()
        steps = gpu_stage.watched_steps(invented_steps(9), seen, len(lengths), True, 2, {})
        with contextlib.suppress(gpu_stage.Enough):
            for length, _ in zip([*lengths, 1], steps, strict=False):
                double(torch.ones(length))
        return seen.compiled_late

    assert run([3, 3, 3, 3]) == 0
    assert run([3, 3, 4, 3]) == 1


def test_losses_are_kept_now_and_then_and_at_the_end():
    seen = gpu_stage.Seen(metrics=[{"step": n, "loss": 1.0 / n} for n in range(1, 26)] + [{"step": 25, "validation_loss": 2.0}])
    assert [step for step, _ in seen.losses(10)] == [10, 20, 25]


@pytest.mark.parametrize(("gradient", "wrong"), [(1.0, False), (1.4, True), (float("nan"), True)])
def test_a_wrong_gradient_does_not_pass_the_gate(gradient, wrong):
    truth = test_gpu_gate.Backward(2.0, {"a": torch.ones(4), "b": torch.ones(4)})
    plain = test_gpu_gate.Backward(2.001, {"a": torch.full((4,), 1.01), "b": torch.full((4,), 0.99)})
    ours = test_gpu_gate.Backward(2.0, {"a": torch.full((4,), gradient), "b": torch.full((4,), 1.012)})
    found = test_gpu_gate.problems("compiled", ours, plain, truth, {})
    assert bool(found) == wrong, found
    far = test_gpu_gate.Backward(2.1, ours.gradients)
    assert any("the loss is" in problem for problem in test_gpu_gate.problems("eager", far, plain, truth, {}))


# ---------------------------------------------------------------- the profile, the text, the stand-ins


SDPA_KERNEL = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma"


def trace() -> dict[str, Any]:
    """Two steps as torch.profiler writes them: launches on the host at ts, kernels on the device much later."""
    events: list[dict[str, Any]] = []

    def span(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args})

    def kernel(name: str, launch: float, dur: float, tid: int = 1, cat: str = "kernel") -> None:
        number = len(events)
        span("cuda_runtime", "cudaLaunchKernel", launch, 1, tid, correlation=number)
        span(cat, name, 1000 + launch, dur, 7, correlation=number)

    for step in (0.0, 100.0):
        span("cpu_op", "fastlm::linear_cross_entropy", step, 20)
        kernel("_rows", step + 1, 30)
        kernel("nvjet_sm90_tst_128x256", step + 5, 500)
        kernel(SDPA_KERNEL, step + 25, 200)
        kernel("triton_poi_fused_add_0", step + 27, 20)
        kernel("Memcpy DtoD (Device -> Device)", step + 28, 10, cat="gpu_memcpy")
        kernel("_rows", step + 3, 30, tid=2)  # at the time of our op, but from another thread
        span("user_annotation", gpu_profile.OPTIMIZER, step + 60, 20)
        span("gpu_user_annotation", gpu_profile.OPTIMIZER, step + 1060, 900)
        kernel("nvjet_sm90_tst_64x64", step + 70, 80)
    events.append({"ph": "M", "name": "process_name"})
    return {"traceEvents": events}


def test_a_profile_is_added_up_by_what_launched_a_kernel_and_by_its_name():
    table = gpu_profile.categories(trace(), 2)
    assert {name: round(found["ms"], 6) for name, found in table.items()} == {
        "matmul": 0.5, "attention": 0.2, "ours": 0.03, "optimizer": 0.08, "generated": 0.02, "copies": 0.01, "other": 0.03,
    }  # fmt: skip
    assert all(found["kernels"] == 1 for found in table.values())
    assert gpu_profile.longest(trace(), 2, 2) == [["nvjet_sm90_tst_128x256", 0.5], [SDPA_KERNEL, 0.2]]


def test_any_text_survives_the_word_tokenizer_and_no_id_is_beyond_the_vocabulary():
    tokenizer = words.word_tokenizer(["a b a b the cat", "the the"], 261, "gpt2")
    text = "the cat\n\n  sat on  é漢 _x1 -> {} \t the"
    ids = tokenizer.encode_array(text)
    assert tokenizer.decode(ids) == text
    assert ids.max() < 260
    assert tokenizer.eos_id == 260
    assert len(tokenizer.encode_array(" the")) == 1, "a frequent word has an id"
    assert tokenizer.hash != words.word_tokenizer(["other words"], 261, "gpt2").hash


def test_stand_ins_take_no_place_of_a_package_that_is_there():
    there = [name for name in stand_ins.MODULES if importlib.util.find_spec(name)]
    before = {name: sys.modules.get(name) for name in there}
    assert not set(stand_ins.stand_in()) & set(there)
    assert {name: sys.modules.get(name) for name in there} == before


def test_a_stand_in_checkpoint_comes_back(tmp_path):
    tensors = {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    stand_ins.save_file(tensors, tmp_path / "model.safetensors")
    found = stand_ins.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# ---------------------------------------------------------------- lines that only a GPU runs


class Event:
    """Stands in for a CUDA event."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What gpu_timing.py asks of torch.cuda, answered on the CPU: a recorded graph replays nothing."""
    arguments = inspect.signature(torch.cuda.graph.__init__)

    @contextlib.contextmanager
    def graph(*given, **named):
        arguments.bind(None, *given, **named)
        yield

    answers = {
        "is_available": lambda: True, "Stream": object, "stream": lambda stream: contextlib.nullcontext(), "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "Event": Event, "synchronize": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=80 * 2**30, uuid="1"),
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 5, "max_memory_allocated": lambda: 12,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    gpu_timing.stream.cache_clear()
    yield gpu_timing
    gpu_timing.stream.cache_clear()


def test_the_lines_that_only_a_gpu_runs(pretended_gpu, monkeypatch):
    gpu, built, called = pretended_gpu, [], []
    assert gpu.copies(16 << 20) == 51
    assert gpu.copies(1 << 40) == 1
    assert gpu.copies(1) == 64

    def build():
        number = len(built)
        built.append(number)
        return lambda: called.append(number)

    turn, how = gpu.recorded(build, 3)
    assert how == "graph"
    assert called == [0, 0, 1, 2, 0, 1, 2], "compiled, warmed up, then recorded once each"
    times = gpu.in_turns({"ours": turn, "peer": lambda: time.sleep(0.004)}, rounds=4, per_turn=2)
    assert len(times["ours"]) == len(times["peer"]) == 4
    assert 1.9 < min(times["peer"]) < 50
    assert gpu.peak_bytes(turn) == 7

    def no_graph(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", no_graph)
    called.clear()
    turn, how = gpu.recorded(build, 2)
    assert how == "launched one by one, no graph: RuntimeError: operation not permitted when stream is capturing"
    called.clear()
    turn()
    assert called == [3, 4]


def test_energy_is_read_from_the_meter_and_there_is_none_without_one(pretended_gpu, monkeypatch):
    class NoMeter(Exception):
        pass

    def refuse(handle: int) -> int:
        raise NoMeter

    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1": 7}[uuid],
                           nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1500 * handle, NVMLError=NoMeter)  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert pretended_gpu.energy_meter()() == 10.5
    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert pretended_gpu.energy_meter() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert pretended_gpu.energy_meter() is None

"""The profile, the text and the stand-ins for absent packages of the GPU's benchmarks."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch

from bench.harness import gpu_profile, stand_ins, words

SDPA_KERNEL = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma"


def trace() -> dict[str, Any]:
    """Two steps as torch.profiler writes them.

    Launches on the host at ts, kernels on the device much later.
    """
    events: list[dict[str, Any]] = []

    def span(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> None:
        events.append(
            {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}
        )

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
        "matmul": 0.5,
        "attention": 0.2,
        "ours": 0.03,
        "optimizer": 0.08,
        "generated": 0.02,
        "copies": 0.01,
        "other": 0.03,
    }
    assert all(found["kernels"] == 1 for found in table.values())
    assert gpu_profile.longest(trace(), 2, 2) == [
        ["nvjet_sm90_tst_128x256", 0.5],
        [SDPA_KERNEL, 0.2],
    ]


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

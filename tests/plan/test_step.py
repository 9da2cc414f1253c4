"""A step's time against counts made elsewhere, and against rings played step by step."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastlm.config import PRESETS, ModelConfig
from fastlm.model import training_flops_per_token
from fastlm.plan import step as plan_step
from fastlm.plan.cards import CARDS
from fastlm.plan.step import Ring, kernel_bytes, pass_s, rings, step, update_s
from fastlm.plan.work import Way, Work, hidden_parameters, stored_parameters, ways

ROOT = Path(__file__).parents[2]
ONE = ways(1, 8)[0]
H100 = CARDS["h100"]
MODELS = {
    **PRESETS,
    "30m": ModelConfig(dim=384, n_layers=6, n_heads=6, n_kv_heads=6, ffn_dim=1024),
    "1b": ModelConfig(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192),
}
WORK = Work(PRESETS["modern-253m"], 32, 1024)


def compiled_steps(unit: str) -> list[tuple[str, int, float]]:
    """(model, tokens of a row, count) of the pretrain steps that bench/counted/ has counted, 32
    rows each."""
    rows = json.loads(
        (ROOT / "bench" / "results" / "h100-projected.json").read_text(encoding="utf-8")
    )["rows"]
    chosen = [
        row
        for row in rows
        if row["group"] == "compiled step" and row["peer"] == "ours" and row["unit"] == unit
    ]
    found = [(row["case"].split(", "), row["median"]) for row in chosen]
    return [
        (name, int(size.split(" x ")[1]), count)
        for (name, stage, size), count in found
        if stage == "pretrain"
    ]


@pytest.mark.parametrize(
    ("name", "length", "gb"), compiled_steps("GB through kernels that are not matmuls")
)
def test_traffic_is_what_the_compiler_counts(name, length, gb):
    assert sum(kernel_bytes(Work(MODELS[name], 32, length))) / 1e9 == pytest.approx(gb, rel=0.03)


@pytest.mark.parametrize(("name", "length", "ms"), compiled_steps("ms, projected"))
def test_passes_take_the_projected_time_at_the_bound(name, length, ms, monkeypatch):
    for rate, share in (
        ("MATMULS_REACH", 700 / 989),
        ("ATTENTION_REACHES", 700 / 989),
        ("KERNELS_REACH", 3.0 / 3.35),
    ):
        monkeypatch.setattr(plan_step, rate, share)
    assert 1e3 * sum(pass_s(Work(MODELS[name], 32, length), H100)) == pytest.approx(ms, rel=0.02)


def expected_steps() -> list[tuple[str, float]]:
    """(model, ms) of docs/kernels.md, "The trainer's step, projected": expected, the optimizer
    included."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^\| (30m|modern-124m|modern-253m|1b) \|.*\| ([\d.]+) ms, [\d.]+% \|$",
        text,
        flags=re.MULTILINE,
    )
    assert len(found) == 4
    return [(name, float(ms)) for name, ms in found]


@pytest.mark.parametrize(("name", "ms"), expected_steps())
def test_a_step_of_one_gpu_is_the_projected_one(name, ms):
    work = Work(MODELS[name], 32, 1024)
    one = step(work, ONE, H100)
    assert 1e3 * one.seconds(1) == pytest.approx(ms, rel=0.02)
    assert one.waiting_s == one.sent_bytes == 0
    assert one.flops == work.tokens * training_flops_per_token(work.config, 1024)


def test_recomputing_costs_the_blocks_forward_again_but_attention():
    plain, again = (sum(pass_s(replace(WORK, recompute=r), H100)) for r in (False, True))
    blocks = (
        2 * WORK.tokens * hidden_parameters(WORK.config) / (plan_step.MATMULS_REACH * H100.flops)
    )
    assert plain + blocks < again < plain + 1.5 * blocks


def ring_by_steps(gpus: int) -> list[int]:
    """Parts that each GPU sends until all have all n parts: in each of the steps the one it got
    last."""
    have = [{gpu} for gpu in range(gpus)]
    last = list(range(gpus))
    sent = [0] * gpus
    while any(len(parts) < gpus for parts in have):
        coming = [last[gpu - 1] for gpu in range(gpus)]
        sent = [n + 1 for n in sent]
        for gpu, part in enumerate(coming):
            have[gpu].add(part)
        last = coming
    return sent


@pytest.mark.parametrize("gpus", [2, 3, 8, 12])
def test_a_ring_sends_what_it_sends_step_by_step(gpus):
    ring = Ring(gpus, 1, 1e9)
    assert {ring.sent(gpus)} == {float(n) for n in ring_by_steps(gpus)}
    hops = plan_step.START_S + (gpus - 1) * plan_step.NODE_HOP_S
    assert ring.seconds(gpus * 1e9) == pytest.approx(gpus - 1 + hops)
    assert ring.all_reduce_s(1e15) == pytest.approx(2 * ring.seconds(1e15), rel=1e-6)


def test_one_gpu_sends_nothing():
    alone = Ring(1, 1, 1e9)
    assert alone.seconds(1e9, 5) == alone.all_reduce_s(1e9, 5) == alone.sent(1e9) == 0


def test_bytes_sent_are_the_closed_forms():
    stored, hidden = stored_parameters(WORK.config), hidden_parameters(WORK.config)
    adamw = replace(WORK, optimizer="adamw")
    ddp, fsdp, hsdp = (step(adamw, way, H100).sent_bytes for way in ways(64, 8))
    assert ddp == 2 * 4 * stored * 63 / 64
    assert fsdp == pytest.approx((2 * stored + 2 * hidden + 4 * stored) * 63 / 64)
    assert hsdp == pytest.approx(
        (2 * stored + 2 * hidden + 4 * stored) * 7 / 8 + 2 * 4 * stored / 8 * 7 / 8
    )
    accumulated = step(replace(adamw, passes=3), ways(64, 8)[1], H100).sent_bytes
    assert accumulated == pytest.approx(3 * fsdp)
    muons = [step(WORK, way, H100).sent_bytes for way in ways(64, 8)]
    extra = [
        2 * hidden * 63 / 64,
        2 * 2 * hidden / 64 * 63 / 64,
        (2 * 7 / 8 + 7 / 8) * 2 * hidden / 8,
    ]
    assert muons == pytest.approx([ddp + extra[0], fsdp + extra[1], hsdp + extra[2]])


def test_what_is_waited_for_is_part_of_what_is_sent():
    for gpus in (2, 8, 64, 1024):
        for way in ways(gpus, 8):
            for passes in (1, 4):
                found = step(replace(WORK, passes=passes), way, H100)
                assert 0 < found.waiting_s < found.sending_s
                assert found.tokens == WORK.tokens * passes * gpus


def test_passes_without_communication_in_between_hide_it():
    ddp = ways(1024, 8)[0]
    shares = []
    for passes in (1, 4, 16):
        found = step(replace(WORK, passes=passes), ddp, H100)
        shares.append(found.waiting_s / found.seconds(passes))
    assert shares == sorted(shares, reverse=True)


def test_a_slow_network_is_waited_for():
    slow = H100._replace(network_gb_s=0.1)
    for way in ways(64, 8):
        fast_wait, slow_wait = (step(WORK, way, gpu).waiting_s for gpu in (H100, slow))
        assert slow_wait > 10 * fast_wait


def test_rings_inside_a_machine_use_its_links_and_hsdp_leaves_it_for_shards_alone():
    ddp, fsdp, hsdp = ways(64, 8)
    assert rings(ddp, H100)[1] == rings(fsdp, H100)[0] == Ring(64, 8, 0.8 * 400e9)
    assert rings(hsdp, H100) == (Ring(8, 1, 0.8 * 450e9), Ring(8, 8, 0.8 * 50e9))


def test_optimizers_work_is_shared_out():
    times = [update_s(WORK, way, H100) for way in (ONE, Way("ddp", 1, 4, 8), Way("fsdp", 4, 1, 8))]
    assert times == sorted(times, reverse=True)
    assert times[2] == pytest.approx(times[0] / 4)  # 12 layers: 3 of each shape's matrices

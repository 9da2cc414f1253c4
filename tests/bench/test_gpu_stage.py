"""What a watched run tells: times, losses, late compilation, and gradients that are wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from bench import test_gpu_gate
from bench.harness import gpu_stage


def invented_steps(n: int) -> Iterator[tuple[list, int, dict]]:
    for _ in range(n):
        yield [], 4, {"tokens": 4}


def test_the_steps_after_the_warm_up_are_timed_and_the_run_ends_after_the_last(monkeypatch):
    seen, done, actions, now = gpu_stage.Seen(), [], [], [0.0]
    monkeypatch.setattr(gpu_stage, "on_gpu", lambda: False)
    monkeypatch.setattr(gpu_stage, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watched = gpu_stage.watched_steps(
        invented_steps(100), seen, 5, True, 2, {3: lambda: actions.append(len(done))}
    )
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
    seen = gpu_stage.Seen(
        metrics=[{"step": n, "loss": 1.0 / n} for n in range(1, 26)]
        + [{"step": 25, "validation_loss": 2.0}]
    )
    assert [step for step, _ in seen.losses(10)] == [10, 20, 25]


@pytest.mark.parametrize(("gradient", "wrong"), [(1.0, False), (1.4, True), (float("nan"), True)])
def test_a_wrong_gradient_does_not_pass_the_gate(gradient, wrong):
    truth = test_gpu_gate.Backward(2.0, {"a": torch.ones(4), "b": torch.ones(4)})
    plain = test_gpu_gate.Backward(
        2.001, {"a": torch.full((4,), 1.01), "b": torch.full((4,), 0.99)}
    )
    ours = test_gpu_gate.Backward(
        2.0, {"a": torch.full((4,), gradient), "b": torch.full((4,), 1.012)}
    )
    found = test_gpu_gate.problems("compiled", ours, plain, truth, {})
    assert bool(found) == wrong, found
    far = test_gpu_gate.Backward(2.1, ours.gradients)
    assert any(
        "the loss is" in problem
        for problem in test_gpu_gate.problems("eager", far, plain, truth, {})
    )

"""The choice of the fastest candidate, with a clock that the tests move."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from peft_kernels._core import timing
from peft_kernels._core.timing import ShapeClass
from tests.clock import Clock

CLASS = ShapeClass.of("operator n=8", 100)


def candidates(clock: Clock) -> dict[str, Any]:
    """What the clock knows, each of which lets another thread go on, if there is one."""
    return {name: clock.takes(name, lambda: time.sleep(0)) for name in clock.costs}


def choose(clock: Clock, why_not: str | None = None) -> str:
    return timing.fastest(CLASS, candidates(clock), clock, why_not, clock)


def clock_with(winners: Mapping[str, str] = {}, **costs: float) -> Clock:
    clock = Clock(**costs)
    clock.winners = dict(winners)
    return clock


@pytest.mark.parametrize(
    ("triton", "expected"), [(50.0, "triton"), (97.9, "triton"), (98.1, "torch"), (100.0, "torch"), (200.0, "torch")]
)
def test_another_wins_only_by_more_than_the_hysteresis(triton: float, expected: str) -> None:
    clock = Clock(torch=100.0, triton=triton)
    assert choose(clock) == expected
    assert clock.winners == {CLASS.key: expected}


def test_the_fastest_of_several_wins() -> None:
    assert choose(Clock(torch=100.0, triton=90.0, cuda=80.0, library=85.0)) == "cuda"


def test_a_class_is_timed_once() -> None:
    clock = Clock(torch=100.0, triton=50.0)
    choose(clock)
    clock.costs["torch"] = 1.0
    assert not clock.ran(lambda: choose(clock))
    assert choose(clock) == "triton"


def test_one_candidate_is_not_timed() -> None:
    clock = Clock(torch=100.0)
    assert choose(clock) == "torch"
    assert not clock.runs and not clock.winners


def test_a_winner_that_is_no_candidate_any_more_is_not_taken() -> None:
    assert choose(clock_with({CLASS.key: "gone"}, torch=100.0, triton=50.0)) == "triton"


def test_another_process_that_was_first_decides() -> None:
    class Second(Clock):
        def add(self, key: str, winner: str) -> None:
            self.winners[key] = "torch"

    assert choose(Second(torch=100.0, triton=50.0)) == "torch"


def test_they_take_turns() -> None:
    clock = Clock(torch=1e6, triton=1e6)
    turns = clock.ran(lambda: choose(clock))[2 * (timing.WARM_UPS + 1) :]
    assert turns[:4] == ["torch", "triton", "triton", "torch"]
    assert turns.count("torch") == turns.count("triton") == timing.TURNS


def test_a_drifting_clock_does_not_decide() -> None:
    """Everything becomes slower from turn to turn; the candidates are alike."""
    clock = Clock()
    slower = iter(range(1000))

    def run() -> None:
        clock.now += 1e4 + 100 * next(slower)

    assert timing.winner_of(timing.time_in_turns({"torch": run, "triton": run}, clock)) == "torch"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, "torch"),
        ({"operator n=8 | 256": "triton"}, "triton"),
        ({"operator n=8 | 256": "triton", "operator n=8 | 4096": "cuda"}, "triton"),
        ({"operator n=8 | 64": "cuda", "operator n=8 | 1024": "triton"}, "cuda"),
        ({"operator n=8 | 256": "gone", "operator n=8 | 4096": "cuda"}, "cuda"),
        ({"operator n=9 | 128": "triton"}, "torch"),
        ({"operator n=8 | 128 128": "triton", "operator n=8 | many": "triton", "operator n=8": "triton"}, "torch"),
    ],
)
def test_where_nothing_may_be_timed_the_nearest_class_decides(known: dict[str, str], expected: str) -> None:
    clock = clock_with(known, torch=100.0, triton=50.0, cuda=10.0)
    assert choose(clock, why_not="captured") == expected
    assert not clock.runs and clock.winners == known


def test_memory_that_runs_out_while_timing_costs_nothing() -> None:
    def run() -> None:
        raise torch.OutOfMemoryError("no memory")

    clock = Clock()
    assert timing.fastest(CLASS, {"torch": lambda: None, "triton": run}, clock, None, clock) == "torch"
    assert not clock.winners


def test_any_other_error_is_the_callers() -> None:
    def run() -> None:
        raise RuntimeError("broken")

    clock = Clock()
    with pytest.raises(RuntimeError, match="broken"):
        timing.fastest(CLASS, {"torch": lambda: None, "triton": run}, clock, None, clock)


def test_threads_time_a_class_once() -> None:
    clock, chosen = Clock(torch=100.0, triton=50.0), []
    threads = [threading.Thread(target=lambda: chosen.append(choose(clock))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    once = Clock(torch=100.0, triton=50.0)
    choose(once)
    assert chosen == ["triton"] * 8
    assert clock.runs == once.runs


def test_classes() -> None:
    assert ShapeClass.of("f", 1000, 1).rows == (1024, 1)
    assert ShapeClass.of("f", 1024) == ShapeClass.of("f", 513) != ShapeClass.of("f", 512)
    assert ShapeClass.of("f", 1024, 16).key == "f | 1024 16"
    assert ShapeClass.of("f", 1024, 16).distance("f | 256 32") == 3


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_KERNELS_TUNE", raising=False)
    assert not timing.is_switched_off()
    monkeypatch.setenv("PEFT_KERNELS_TUNE", "0")
    assert timing.why_not_timed(torch.device("cuda"), 0) == "PEFT_KERNELS_TUNE=0"
    monkeypatch.setenv("PEFT_KERNELS_TUNE", "no")
    with pytest.raises(ValueError, match="PEFT_KERNELS_TUNE must be 0 or 1, got 'no'"):
        timing.is_switched_off()


def test_a_cpu_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_KERNELS_TUNE", raising=False)
    assert timing.why_not_timed(torch.device("cpu"), 0) == "only calls on a GPU are timed"


def test_capture_and_short_memory_time_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_KERNELS_TUNE", raising=False)
    device, gib = torch.device("cuda", 0), 1 << 30
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * gib, 8 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * gib)
    assert timing.why_not_timed(device, 2 * gib) is None
    assert timing.why_not_timed(device, 2 * gib + 1).startswith("memory is short: a call takes 2048 MiB more")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert timing.why_not_timed(device, 0) == "a CUDA graph is being captured"

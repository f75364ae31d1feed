"""The choice of the fastest candidate, with a clock that the tests move."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import pytest
import torch

from peft_kernels._core import timing
from peft_kernels._core.timing import ShapeClass

CLASS = ShapeClass.of("operator n=8", 100)


class FakeClock:
    """Moves by what a candidate says that it takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[str] = []

    def mark(self) -> float:
        return self.now

    def finish(self) -> None:
        """There is no device to wait for."""

    def elapsed_us(self, start: float, stop: float) -> float:
        return stop - start

    def candidates(self, **microseconds: float) -> dict[str, object]:
        def runner(name: str, cost: float) -> object:
            def run() -> None:
                self.turns.append(name)
                self.now += cost
                time.sleep(0)  # to another thread, if there is one

            return run

        return {name: runner(name, cost) for name, cost in microseconds.items()}


class Remembered:
    def __init__(self, winners: Mapping[str, str] = {}) -> None:
        self.winners = dict(winners)

    def read(self, again: bool = False) -> Mapping[str, str]:
        return self.winners

    def add(self, key: str, winner: str) -> None:
        self.winners.setdefault(key, winner)


def choose(clock: FakeClock, winners: Remembered, why_not: str | None = None, **microseconds: float) -> str:
    return timing.fastest(CLASS, clock.candidates(**microseconds), winners, why_not, clock)


@pytest.mark.parametrize(
    ("triton", "expected"), [(50.0, "triton"), (97.9, "triton"), (98.1, "torch"), (100.0, "torch"), (200.0, "torch")]
)
def test_another_wins_only_by_more_than_the_hysteresis(triton: float, expected: str) -> None:
    winners = Remembered()
    assert choose(FakeClock(), winners, torch=100.0, triton=triton) == expected
    assert winners.winners == {CLASS.key: expected}


def test_the_fastest_of_several_wins() -> None:
    assert choose(FakeClock(), Remembered(), torch=100.0, triton=90.0, cuda=80.0, library=85.0) == "cuda"


def test_a_class_is_timed_once() -> None:
    clock, winners = FakeClock(), Remembered()
    choose(clock, winners, torch=100.0, triton=50.0)
    timed = len(clock.turns)
    assert choose(clock, winners, torch=1.0, triton=50.0) == "triton"
    assert len(clock.turns) == timed


def test_one_candidate_is_not_timed() -> None:
    clock, winners = FakeClock(), Remembered()
    assert choose(clock, winners, torch=100.0) == "torch"
    assert not clock.turns and not winners.winners


def test_a_winner_that_is_no_candidate_any_more_is_not_taken() -> None:
    clock, winners = FakeClock(), Remembered({CLASS.key: "gone"})
    assert choose(clock, winners, torch=100.0, triton=50.0) == "triton"


def test_another_process_that_was_first_decides() -> None:
    class First(Remembered):
        def add(self, key: str, winner: str) -> None:
            self.winners[key] = "torch"

    assert choose(FakeClock(), First(), torch=100.0, triton=50.0) == "torch"


def test_they_take_turns() -> None:
    clock = FakeClock()
    choose(clock, Remembered(), torch=1e6, triton=1e6)
    turns = clock.turns[2 * (timing.WARM_UPS + 1) :]
    assert turns[:4] == ["torch", "triton", "triton", "torch"]
    assert turns.count("torch") == turns.count("triton") == timing.TURNS


def test_a_drifting_clock_does_not_decide() -> None:
    """Everything becomes slower from turn to turn; the candidates are alike."""
    clock = FakeClock()
    slower = iter(range(1000))

    def run() -> None:
        clock.now += 1e4 + 100 * next(slower)

    candidates = {"torch": run, "triton": run}
    assert timing.winner_of(timing.time_in_turns(candidates, clock)) == "torch"


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
    clock, winners = FakeClock(), Remembered(known)
    assert choose(clock, winners, why_not="captured", torch=100.0, triton=50.0, cuda=10.0) == expected
    assert not clock.turns and winners.winners == known


def test_memory_that_runs_out_while_timing_costs_nothing() -> None:
    def run() -> None:
        raise torch.OutOfMemoryError("no memory")

    winners = Remembered()
    assert timing.fastest(CLASS, {"torch": lambda: None, "triton": run}, winners, None, FakeClock()) == "torch"
    assert not winners.winners


def test_any_other_error_is_the_callers() -> None:
    def run() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timing.fastest(CLASS, {"torch": lambda: None, "triton": run}, Remembered(), None, FakeClock())


def test_threads_time_a_class_once() -> None:
    clock, winners, chosen = FakeClock(), Remembered(), []
    threads = [
        threading.Thread(target=lambda: chosen.append(choose(clock, winners, torch=100.0, triton=50.0)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    once = FakeClock()
    choose(once, Remembered(), torch=100.0, triton=50.0)
    assert chosen == ["triton"] * 8
    assert clock.turns == once.turns


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

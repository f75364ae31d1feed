"""Times of several providers, taken in turns.

Clocks, temperature and neighbours drift over seconds. Providers therefore take turns within each repetition, and who
goes first changes from one to the next, so that a drift falls on all alike. On a GPU each turn replays a CUDA graph of
several calls over inputs that together exceed the L2 cache: neither launches nor cached inputs are measured.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

# Long against the microsecond that an event resolves, short against drift.
GRAPH_US = 2000.0
CPU_TURN_US = 1000.0
MAX_CALLS = 256
WARM_UPS = 3

# Share of the device's memory that the rotated inputs may take.
MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the repetitions, and how they were taken."""

    median_us: float
    p20_us: float
    p80_us: float
    repetitions: int
    calls: int
    timing: Literal["graph", "events", "host"]
    note: str | None


@dataclass(frozen=True)
class Runner:
    """A turn of one provider: ``run`` makes ``calls`` calls."""

    run: Callable[[], None]
    calls: int
    timing: Literal["graph", "events", "host"]
    note: str | None = None


# For each provider its call on each set of inputs.
Calls = Mapping[str, Sequence[Callable[[], object]]]


class Clock(Protocol):
    """A source of marks between which time is measured, perhaps only later."""

    def mark(self) -> Any: ...

    def finish(self) -> None: ...

    def elapsed_us(self, start: Any, stop: Any) -> float: ...


class HostClock:
    def mark(self) -> int:
        return time.perf_counter_ns()

    def finish(self) -> None:
        """The host waits for its own work."""

    def elapsed_us(self, start: int, stop: int) -> float:
        return (stop - start) / 1e3


class EventClock:
    """Events of the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        torch.cuda.synchronize()

    def elapsed_us(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop) * 1e3


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the closest ranks."""
    if not values:
        raise ValueError("quantile of no values")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def set_count(set_bytes: int, cache_bytes: int, memory_bytes: int) -> int:
    """Number of input sets such that more than twice the cache is touched between two uses of the same one.

    Where that does not fit into a share of the memory, as many as fit; never fewer than two.
    """
    wanted = 2 + 2 * cache_bytes // max(1, set_bytes)
    fitting = int(memory_bytes * MEMORY_SHARE) // max(1, set_bytes)
    return max(2, min(wanted, fitting))


def calls_per_turn(call_us: float, sets: int, target_us: float) -> int:
    """The least multiple of ``sets`` whose calls last ``target_us``, so that every set counts alike.

    At most MAX_CALLS, but one for each set.
    """
    rounds = math.ceil(target_us / max(call_us, 1e-3) / sets)
    return sets * max(1, min(rounds, MAX_CALLS // sets))


def repetition_count(round_us: float, target_us: float, least: int, most: int) -> int:
    """Number of repetitions, each a turn of every provider, that take about ``target_us``."""
    return max(least, min(most, int(target_us / max(round_us, 1e-3))))


def turns(names: Sequence[str], repetitions: int) -> Iterator[tuple[str, ...]]:
    """For each repetition the order in which providers take their turn: the first one moves to the end."""
    for repetition in range(repetitions):
        first = repetition % len(names) if names else 0
        yield (*names[first:], *names[:first])


def interleave(runners: Mapping[str, Runner], repetitions: int, clock: Clock) -> dict[str, list[float]]:
    """Let the runners take turns; microseconds per call for each, one value per repetition."""
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runners}
    with _no_garbage_collection():
        for order in turns(tuple(runners), repetitions):
            for name in order:
                start = clock.mark()
                runners[name].run()
                marks[name].append((start, clock.mark()))
        clock.finish()
    return {
        name: [clock.elapsed_us(start, stop) / runners[name].calls for start, stop in pairs]
        for name, pairs in marks.items()
    }


def summarize(runner: Runner, samples: Sequence[float]) -> Timing:
    """Median and spread of a runner's samples."""
    return Timing(
        median_us=quantile(samples, 0.5),
        p20_us=quantile(samples, 0.2),
        p80_us=quantile(samples, 0.8),
        repetitions=len(samples),
        calls=runner.calls,
        timing=runner.timing,
        note=runner.note,
    )


def time_on_host(calls: Calls, target_us: float, least: int) -> dict[str, Timing]:
    """Time functions on the CPU.

    Args:
        calls: for each provider its call on each set of inputs.
        target_us: about how long the measurement of one provider may last.
        least: number of repetitions below which none is stopped.
    """
    clock = HostClock()
    runners, estimates = {}, {}
    for name, functions in calls.items():
        _run(functions, len(functions))
        start = clock.mark()
        _run(functions, len(functions))
        call_us = clock.elapsed_us(start, clock.mark()) / len(functions)
        count = calls_per_turn(call_us, len(functions), CPU_TURN_US) if call_us < CPU_TURN_US else 1
        runners[name] = _rotating(functions, count)
        estimates[name] = call_us * count
    return _timed(runners, estimates, target_us, least, clock)


def time_on_cuda(calls: Calls, target_us: float, least: int) -> dict[str, Timing]:
    """Time functions on the current CUDA device; the arguments are ``time_on_host``'s.

    Must run inside ``torch.cuda.stream`` of a stream that is not the default one, which cannot be captured; whatever
    the functions hold on to (a recorded graph) must have been made on it too.
    """
    clock = EventClock()
    pool = torch.cuda.graph_pool_handle()
    runners, estimates = {}, {}
    for name, functions in calls.items():
        for _ in range(WARM_UPS):
            _run(functions, len(functions))
        start = clock.mark()
        _run(functions, len(functions))
        stop = clock.mark()
        clock.finish()
        count = calls_per_turn(clock.elapsed_us(start, stop) / len(functions), len(functions), GRAPH_US)
        runners[name] = capture(functions, count, pool)
        # Launch gaps, which the first estimate holds, are most of a small problem.
        start = clock.mark()
        runners[name].run()
        stop = clock.mark()
        clock.finish()
        estimates[name] = clock.elapsed_us(start, stop)
    return _timed(runners, estimates, target_us, least, clock)


def capture(functions: Sequence[Callable[[], object]], count: int, pool: Any) -> Runner:
    """Make a turn that replays a graph of ``count`` calls; eager calls, with the reason, where they cannot be captured.

    Graphs of one measurement share a pool: they replay one after another on one stream, and nobody reads their outputs.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            _run(functions, count)
    except RuntimeError as error:
        torch.cuda.synchronize()
        note = f"not captured: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Runner(lambda: _run(functions, count), count, "events", note)
    return Runner(graph.replay, count, "graph")


def _timed(
    runners: Mapping[str, Runner], estimates: Mapping[str, float], target_us: float, least: int, clock: Clock
) -> dict[str, Timing]:
    repetitions = repetition_count(sum(estimates.values()), target_us * len(runners), least, most=200)
    samples = interleave(runners, repetitions, clock)
    return {name: summarize(runner, samples[name]) for name, runner in runners.items()}


def _run(functions: Sequence[Callable[[], object]], count: int) -> None:
    for index in range(count):
        functions[index % len(functions)]()


def _rotating(functions: Sequence[Callable[[], object]], count: int) -> Runner:
    """A turn that goes on with the set after the one where the last turn ended."""
    position = 0

    def run() -> None:
        nonlocal position
        for _ in range(count):
            functions[position % len(functions)]()
            position += 1

    return Runner(run, count, "host")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

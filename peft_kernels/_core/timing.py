"""Which of several candidates is fastest on this machine: timed once for each class of shapes, and remembered.

What is right is decided before (qualification); every candidate gives the caller the same result. A candidate is a
whole call: forward, and backward where the call has one. Where nothing may be timed, the winner of the nearest class
that was timed runs, and the first guess where there is none.
"""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from peft_kernels._core.triton_tools import next_power_of_2

ENVIRONMENT_VARIABLE = "PEFT_KERNELS_TUNE"

# Another candidate than the first guess wins only by more: two runs of one kernel differ by about as much.
HYSTERESIS = 0.02
TURNS = 7
WARM_UPS = 2
# A turn repeats a call until it is long against an event's resolution of half a microsecond.
TURN_US = 300.0
MAX_CALLS = 32
# Of the free memory, what a call may take again while it is timed: its results are there beside the caller's.
MEMORY_SHARE = 0.5


class ShapeClass(NamedTuple):
    """Calls among which one candidate is assumed to be fastest.

    Attributes:
        facts: what must be equal: operator, dtypes, weights' sizes, whether there is a backward pass.
        rows: sizes that change from call to call, rounded up to powers of two.
    """

    facts: str
    rows: tuple[int, ...]

    @staticmethod
    def of(facts: str, *rows: int) -> ShapeClass:
        return ShapeClass(facts, tuple(map(next_power_of_2, rows)))

    @property
    def key(self) -> str:
        """Its name in a record."""
        return f"{self.facts} | {' '.join(map(str, self.rows))}"

    def distance(self, key: str) -> int | None:
        """How many doublings lie between this class and a recorded one; None where other facts differ."""
        facts, _, rows = key.partition(" | ")
        sizes = rows.split(" ") if rows else []
        if facts != self.facts or len(sizes) != len(self.rows) or not all(size.isdecimal() for size in sizes):
            return None
        return sum(abs(int(a).bit_length() - b.bit_length()) for a, b in zip(sizes, self.rows, strict=True))


class Winners(Protocol):
    """Where winners are remembered."""

    def read(self, again: bool = False) -> Mapping[str, str]:
        """The winner's name for each class's key; ``again``: with what other processes have found since."""
        ...

    def add(self, key: str, winner: str) -> None:
        """Remember one; where another process was first, its winner stays."""
        ...


class Clock(Protocol):
    """A source of marks between which time is measured, perhaps only later."""

    def mark(self) -> Any: ...

    def finish(self) -> None: ...

    def elapsed_us(self, start: Any, stop: Any) -> float: ...


class EventClock:
    """Events of the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish(self) -> None:
        torch.cuda.current_stream().synchronize()

    def elapsed_us(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop) * 1e3


# A layer that is timed may have its operator's implementations timed within.
_timing = threading.RLock()


def clock_of(device: torch.device) -> Clock:
    """A clock for what runs on a device."""
    return EventClock()


def is_switched_off() -> bool:
    """Whether PEFT_KERNELS_TUNE=0 asks for the same choice on every machine.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be 0 or 1, got {value!r}")
    return value == "0"


def may_decide(device: torch.device) -> bool:
    """Whether calls on a device are decided by the clock: where kernels run that were written for it."""
    return device.type == "cuda" and not is_switched_off()


def why_not_timed(device: torch.device, call_bytes: int) -> str | None:
    """Reason why nothing may be timed now, or None.

    Args:
        device: of the call's tensors.
        call_bytes: about what a call allocates.
    """
    if not may_decide(device):
        return f"{ENVIRONMENT_VARIABLE}=0" if is_switched_off() else "only calls on a GPU are timed"
    if torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if call_bytes > MEMORY_SHARE * (free + cached):
        return f"memory is short: a call takes {call_bytes >> 20} MiB more, and {(free + cached) >> 20} are free"
    return None


def fastest(
    shape_class: ShapeClass,
    candidates: Mapping[str, Callable[[], object]],
    winners: Winners,
    why_not: str | None,
    clock: Clock,
) -> str:
    """Name the candidate that runs a class of shapes.

    Args:
        shape_class: of the call.
        candidates: by name, the first guess first; each runs the call once and drops its results.
        winners: of earlier calls, also those of other processes.
        why_not: reason why nothing may be timed now; then nothing is remembered either.
        clock: for the time that a candidate takes on the device.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    known = _known(shape_class, candidates, winners)
    if known is not None:
        return known
    if why_not is not None:
        return nearest(shape_class, winners.read(), tuple(candidates))
    # Two threads that measure at once would measure each other.
    with _timing:
        known = _known(shape_class, candidates, winners, again=True)
        if known is not None:
            return known
        try:
            times = time_in_turns(candidates, clock)
        except torch.OutOfMemoryError:
            # What was free may be gone. The call itself has yet to run, and had better not fail for a measurement.
            return nearest(shape_class, winners.read(), tuple(candidates))
        winners.add(shape_class.key, winner_of(times))
    return _known(shape_class, candidates, winners) or winner_of(times)


def _known(shape_class: ShapeClass, candidates: Mapping[str, Any], winners: Winners, again: bool = False) -> str | None:
    """The winner of a class, if it is still a candidate."""
    name = winners.read(again).get(shape_class.key)
    return name if name in candidates else None


def nearest(shape_class: ShapeClass, winners: Mapping[str, str], candidates: Sequence[str]) -> str:
    """The winner of the class with the fewest doublings between, smaller ones first; else the first guess."""
    found = [
        (distance, key, name)
        for key, name in winners.items()
        if name in candidates and (distance := shape_class.distance(key)) is not None
    ]
    return min(found)[2] if found else candidates[0]


def winner_of(times: Mapping[str, float]) -> str:
    """The fastest; the first unless it is beaten by more than HYSTERESIS."""
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - HYSTERESIS) * times[first] else first


def time_in_turns(candidates: Mapping[str, Callable[[], object]], clock: Clock) -> dict[str, float]:
    """Median microseconds of a call of each; they take turns, so that a drift of the clocks falls on all alike."""
    calls = {}
    for name, run in candidates.items():
        for _ in range(WARM_UPS):
            run()
        start = clock.mark()
        run()
        stop = clock.mark()
        clock.finish()
        calls[name] = max(1, min(MAX_CALLS, int(TURN_US / max(clock.elapsed_us(start, stop), 1e-3))))
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in candidates}
    names = tuple(candidates)
    for turn in range(TURNS):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            start = clock.mark()
            for _ in range(calls[name]):
                candidates[name]()
            marks[name].append((start, clock.mark()))
    clock.finish()
    return {
        name: statistics.median(clock.elapsed_us(start, stop) for start, stop in pairs) / calls[name]
        for name, pairs in marks.items()
    }

"""A machine whose calls are timed as on a GPU, on CPU tensors, by a clock that only the tests move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from peft_kernels._core import candidates, dispatch, plans, timing


class Clock:
    """Time in microseconds, and what is remembered of it.

    Attributes:
        costs: microseconds of a run, by name.
        runs: names of what ran, in order.
        winners: by the key of a class of shapes.
    """

    def __init__(self, **costs: float) -> None:
        self.costs, self.now = dict(costs), 0.0
        self.runs: list[str] = []
        self.winners: dict[str, str] = {}

    def mark(self) -> float:
        return self.now

    def finish(self) -> None:
        """Nothing is under way."""

    def elapsed_us(self, start: float, stop: float) -> float:
        return stop - start

    def read(self, again: bool = False) -> Mapping[str, str]:
        return self.winners

    def add(self, key: str, winner: str) -> None:
        self.winners.setdefault(key, winner)

    def takes(self, name: str, run: Callable[..., Any] = lambda: None) -> Callable[..., Any]:
        """A function that takes as long as ``costs`` says."""

        def taking(*arguments: Any, **options: Any) -> Any:
            self.runs.append(name)
            self.now += self.costs[name]
            return run(*arguments, **options)

        return taking

    def ran(self, call: Callable[[], Any]) -> list[str]:
        """Names of what runs in a call."""
        self.runs.clear()
        call()
        return self.runs.copy()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have it decide, whatever the device, but for where the environment says that nothing does."""
        monkeypatch.setattr(timing, "may_decide", lambda device: not timing.is_switched_off())
        monkeypatch.setattr(timing, "why_not_timed", lambda device, call_bytes: None)
        monkeypatch.setattr(timing, "clock_of", lambda device: self)
        monkeypatch.setattr(plans, "_is_timed", lambda device: True)
        monkeypatch.setattr(candidates, "Recorded", lambda device: self)
        # Plans that were made before know nothing of it.
        dispatch.choices_changed()

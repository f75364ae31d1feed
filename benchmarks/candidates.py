"""Configs to try instead of the one in force: what ``tune`` searches, and how it puts a candidate in place.

A candidate is a set of changes relative to what a function of a family's ``config.py`` returns, so that it applies to
every call of that function within a problem, whatever it is called with.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# These follow from the problem: another size is another function or leaves columns out.
_FIXED = ("BLOCK_R", "BLOCK_D", "USE_TMA")
_LEAST_BLOCK, _LARGEST_BLOCK = 16, 512
_MOST_STAGES = 6
_WARPS = (4, 8)


@dataclass(frozen=True)
class Change:
    """One field of a config, or the whole of a value that is no dataclass.

    Attributes:
        field: its name; "" is the value itself.
        how: "*2", "/2", "+1", "-1", or "=value".
    """

    field: str
    how: str

    def __str__(self) -> str:
        return f"{self.field}{self.how}"


Candidate = tuple[Change, ...]


def label(candidate: Candidate) -> str:
    """One word for a candidate; the config in force is "as is"."""
    return ",".join(map(str, candidate)) or "as is"


def apply(candidate: Candidate, value: Any) -> Any | None:
    """The changed value, or None where a change leads out of what makes sense."""
    for change in candidate:
        if change.field == "":
            value = _changed(value, change.how)
            continue
        new = _changed(getattr(value, change.field), change.how)
        if not _makes_sense(change.field, new):
            return None
        value = dataclasses.replace(value, **{change.field: new})
    return value


def tunables(config: ModuleType) -> dict[str, Callable[..., Any]]:
    """The functions of a family's config.py that choose something: a config, one of several names, yes or no."""
    found = {}
    for name, function in inspect.getmembers(config, inspect.isfunction):
        if not name.startswith("_") and function.__module__ == config.__name__ and _moves(_returned(function)):
            found[name] = function
    return found


def candidates(function: Callable[..., Any], most_changes: int = 2) -> list[Candidate]:
    """The value in force, then everything that differs from it in one field, then in two, and so on."""
    moves = _moves(_returned(function))
    found: list[Candidate] = [()]
    for count in range(1, most_changes + 1):
        for group in itertools.combinations(moves, count):
            # Of a field that is changed twice, one change is the last.
            if len({change.field for change in group}) == count:
                found.append(group)
    return found


@contextmanager
def in_force(config: ModuleType, name: str, candidate: Candidate) -> Iterator[list[tuple[Any, Any]]]:
    """Let ``config.name`` return changed values inside the block.

    Yields:
        The (own, changed) values of every call, as they come.

    Raises:
        ValueError: from the call itself, where the change leads out of what makes sense.
    """
    original = getattr(config, name)
    seen: list[tuple[Any, Any]] = []

    @functools.wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        own = original(*args, **kwargs)
        new = apply(candidate, own)
        if new is None:
            raise ValueError(f"{label(candidate)} leads out of what makes sense at {own}")
        seen.append((own, new))
        return new

    setattr(config, name, changed)
    try:
        yield seen
    finally:
        setattr(config, name, original)


def _returned(function: Callable[..., Any]) -> Any:
    return typing.get_type_hints(function).get("return")


def _moves(returned: Any) -> list[Change]:
    if typing.get_origin(returned) is typing.Literal:
        return [Change("", f"={value}") for value in typing.get_args(returned)]
    if returned is bool:
        return [Change("", f"={value}") for value in (True, False)]
    if not dataclasses.is_dataclass(returned):
        return []
    return [Change(field.name, how) for field in dataclasses.fields(returned) for how in _hows(field.name)]


def _hows(field: str) -> tuple[str, ...]:
    if field in _FIXED:
        return ()
    if field == "num_warps":
        return tuple(f"={warps}" for warps in _WARPS)
    return ("+1", "-1") if field == "num_stages" else ("*2", "/2")


def _changed(value: Any, how: str) -> Any:
    if how.startswith("="):
        literals: Mapping[str, Any] = {"True": True, "False": False, **{str(warps): warps for warps in _WARPS}}
        return literals.get(how[1:], how[1:])
    step = int(how[1:])
    return {"*": value * step, "/": value // step, "+": value + step, "-": value - step}[how[0]]


def _makes_sense(field: str, value: Any) -> bool:
    if field.startswith("BLOCK_"):
        return _LEAST_BLOCK <= value <= _LARGEST_BLOCK
    if field == "num_stages":
        return 1 <= value <= _MOST_STAGES
    return value >= 1

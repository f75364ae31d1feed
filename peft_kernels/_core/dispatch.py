"""Choice of a backend at call time, with the reasons for every refusal.

A family lists its implementations in the order ``auto`` tries them. Each answers ``why_not(problem)``; a forced backend
never falls back, and ``auto`` that ends on torch on a CUDA tensor says once why nothing better ran.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from peft_kernels._core import records, verdicts
from peft_kernels._core.block import Block
from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.qualification import Qualification

BACKENDS = ("torch", "triton", "cuda")
ENVIRONMENT_VARIABLE = "PEFT_KERNELS_BACKEND"
_ENCODED = os.environ.encodekey(ENVIRONMENT_VARIABLE)

ROW_INVARIANT = " row-invariant"
"""Stands behind the name of the backend in force, and of what runs, where ``use_row_invariant`` is in force."""

generation = 0
"""Grows when what ``auto`` chooses may have changed: a choice that was remembered before is made again."""

_PACKAGE = str(Path(__file__).resolve().parent.parent)
_log = logging.getLogger("peft_kernels")
_said: set[tuple[str, ...]] = set()

_forced: ContextVar[str | None] = ContextVar("peft_kernels_backend", default=None)
# The open blocks of all threads, the innermost last: the threads that were there before, and what is in force inside.
_blocks: list[tuple[frozenset[threading.Thread], str]] = []


class _Traced(threading.local):
    """What of the above torch.compile can guard: it knows no ContextVar."""

    block: str | None = None


_traced = _Traced()
_open_blocks: tuple[str, ...] = ()


def choices_changed() -> None:
    """Tell all that remember a choice that it may be another one now."""
    global generation
    generation += 1


records.on_update.append(choices_changed)


def _never(problem: Any = None) -> None:
    return None


def _no_gradients(*arguments: Any) -> tuple[()]:
    return ()


def _no_paths(problem: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Implementation:
    """What one backend of one operator can do.

    Attributes:
        name: "torch", "triton" or "cuda".
        forward, backward: the operator's own signature, the same for all its implementations; no ``backward`` where
            nothing has a gradient.
        why_not_environment: reason why it cannot run in this process at all, or None.
        why_not: reason why it cannot run this problem, or None; implies the environment's reason. A value of the
            problem stands at the end of a reason, after ", got", so that a warning can leave it out.
        slower: reason why ``auto`` need not even time it on a problem that it can run, or None; ends as those of
            ``why_not`` do.
        qualification: how a machine finds out whether it is right there; ``auto`` takes it nowhere else. None: it is
            torch's own code, which needs no check.
        borrows: backends whose functions do what this one has no kernels for.
        paths: names of the ways in which it can run a problem that it can run, its own choice first; ``forward`` and
            ``backward`` then take a ``path``.
        path: the one that ``forward`` and ``backward`` are bound to, if they are.
        row_invariant: the form of it that ``use_row_invariant`` takes, if it has one.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] = _no_gradients
    why_not_environment: Callable[[], str | None] = _never
    why_not: Callable[[Any], str | None] = _never
    slower: Callable[[Any], str | None] = _never
    qualification: Qualification | None = None
    borrows: tuple[str, ...] = ()
    paths: Callable[[Any], tuple[str, ...]] = _no_paths
    path: str | None = None
    row_invariant: Implementation | None = None

    @property
    def title(self) -> str:
        """The backend's name, with the path where it is bound to one."""
        return self.name if self.path is None else f"{self.name}:{self.path}"

    def bound(self, problem: Any) -> tuple[Implementation, ...]:
        """Itself bound to each of its paths for a problem, or itself where it has but one way."""
        paths = self.paths(problem) if self.path is None else ()
        return tuple(_bound(self, path) for path in paths) if len(paths) > 1 else (self,)

    def why_not_auto(self, problem: Any) -> str | None:
        """Reason why ``auto`` passes over it although it can run the problem, or None; may wait for a check."""
        reason = self.slower(problem)
        if reason is not None or self.qualification is None:
            return reason
        return verdicts.why_not(self.name, self.qualification, problem)


@lru_cache(maxsize=64)
def _bound(implementation: Implementation, path: str) -> Implementation:
    forward, backward = partial(implementation.forward, path=path), partial(implementation.backward, path=path)
    return replace(implementation, forward=forward, backward=backward, path=path)


def use_backend(backend: str) -> Block:
    """Force a backend inside a ``with`` block, or in a function that this decorates.

    It holds in this thread or task, and in threads that are started while the block is open and open none of their own.
    A call that torch.compile traced in the block is traced again outside of it. The call alone forces nothing, and
    warns; ``PEFT_KERNELS_BACKEND`` forces a backend for the whole process.

    Args:
        backend: "torch", "triton" or "cuda"; "auto" undoes an outer block.

    Raises:
        ValueError: the name is unknown, or what is decorated is a class, a generator or a coroutine function.

    Example:
        >>> import torch, peft_kernels as pk
        >>> x, w, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
        >>> with pk.use_backend("torch"):
        ...     pk.lora_linear(x, w, a, b).shape
        torch.Size([2, 3])
    """
    _checked(backend, "use_backend")
    inside = partial(forcing, lambda outer: backend + _mode_of(outer))
    return Block(f"use_backend({backend!r})", inside, Block.line_of_the_caller())


@contextmanager
def forcing(change: Callable[[str], str]) -> Iterator[None]:
    """A block in which something else is in force: ``change`` is given what is outside, "" for nothing."""
    inside = change(_in_force() or "")
    block = (frozenset(threading.enumerate()), inside)
    token, outer = _forced.set(inside), _traced.block
    _blocks.append(block)
    _note_blocks(inside)
    try:
        yield
    finally:
        _forced.reset(token)
        _blocks.remove(block)
        _note_blocks(outer)


def _note_blocks(inside: str | None) -> None:
    global _open_blocks
    _traced.block, _open_blocks = inside, tuple(name for _, name in _blocks)


def _in_force() -> str | None:
    """What the blocks around have in force."""
    inside = _forced.get()
    if inside is None and _blocks:
        thread = threading.current_thread()
        return next((name for before, name in reversed(_blocks) if thread not in before), None)
    return inside


def _mode_of(inside: str) -> str:
    return ROW_INVARIANT if inside.endswith(ROW_INVARIANT) else ""


def requested_backend(backend: str | None) -> str:
    """The backend in force: the call's argument, else the ``use_backend`` block, else the environment, else "auto".

    ``ROW_INVARIANT`` stands behind it where that is in force too.
    """
    inside = _forced.get()
    if inside is None and _blocks:
        inside = _in_force()
    if backend is not None:
        return _checked(backend, "backend") + (_mode_of(inside) if inside else "")
    if inside and not inside.startswith(ROW_INVARIANT):
        return inside
    # A tenth of the time that get takes, in every call.
    if _ENCODED not in os.environ._data:  # type: ignore[attr-defined]
        return "auto" + (inside or "")
    return _of_environment() + (inside or "")


def _of_environment() -> str:
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def backend_of_graph(backend: str | None) -> str:
    """The same while a graph is traced; reads what torch.compile can guard, so that another block is traced again."""
    return _constant(backend, _traced.block, _open_blocks)


def _constant(backend: str | None, *guarded: object) -> str:
    return requested_backend(backend)


# What torch.compiler.assume_constant_result does; but that imports torch's compiler, and Triton with it.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select_backend(
    operator: str, implementations: Sequence[Implementation], problem: Any, backend: str
) -> Implementation:
    """Pick the implementation for a problem.

    Args:
        operator: name for messages.
        implementations: in the order ``auto`` tries them; the last is torch and refuses nothing.
        problem: the operator's problem description; has ``device``.
        backend: as ``requested_backend`` returns it.

    Raises:
        UnsupportedError: a forced backend cannot run the problem.
    """
    if backend.endswith(ROW_INVARIANT):
        implementations = row_invariant_forms(tuple(implementations))
    if not backend.startswith("auto"):
        return _select_forced(operator, implementations, problem, backend)
    refusals: list[str] = []
    chosen = next(_able(implementations, problem, refusals), None)
    if chosen is None:
        raise UnsupportedError(f"{operator}: no backend can run this problem ({'; '.join(refusals)})")
    if refusals:
        _say_once(operator, chosen, refusals, problem)
    return chosen


def able_backends(implementations: Sequence[Implementation], problem: Any) -> tuple[Implementation, ...]:
    """All that ``auto`` may take for a problem, each on each of its paths; the first is what ``select_backend`` takes.

    May wait until kernels are checked on this machine.
    """
    able = _able(implementations, problem, [])
    return tuple(bound for implementation in able for bound in implementation.bound(problem))


@lru_cache(maxsize=64)
def row_invariant_forms(implementations: tuple[Implementation, ...]) -> tuple[Implementation, ...]:
    """Of each implementation the form that ``use_row_invariant`` takes; one that has none refuses everything."""
    return tuple(each.row_invariant or _refusing(each) for each in implementations)


def _refusing(implementation: Implementation) -> Implementation:
    reason = "the order of its sums depends on the number of rows"
    return replace(
        implementation, name=implementation.name + ROW_INVARIANT, why_not=lambda problem: reason, qualification=None
    )


def way_out(backend: str) -> str:
    """What to do where a backend in force cannot run something."""
    return (
        "outside of use_row_invariant() it may" if backend.endswith(ROW_INVARIANT) else "backend='torch' or 'auto' can"
    )


def _able(implementations: Sequence[Implementation], problem: Any, refusals: list[str]) -> Iterator[Implementation]:
    """Those that ``auto`` may take; the reasons why it passes over others are added to ``refusals``."""
    for implementation in implementations:
        reason = implementation.why_not(problem) or implementation.why_not_auto(problem)
        if reason is None:
            yield implementation
        else:
            refusals.append(f"{implementation.name}: {reason}")


def explain_backend(
    operator: str, implementations: Sequence[Implementation], problem: Any, backend: str, chosen: Implementation
) -> str:
    """Describe a choice, and why it passed over the others; a line each."""
    lines = [f"{operator}: {chosen.title}"]
    if backend.endswith(ROW_INVARIANT):
        implementations = row_invariant_forms(tuple(implementations))
        lines.append("  use_row_invariant() is in force: a row's bits depend on no other row")
        backend = backend.removesuffix(ROW_INVARIANT)
    if backend != "auto":
        lines.append(f"  backend={backend!r} is forced")
        return "\n".join(lines)
    names = [each.name for each in implementations]
    for place, each in enumerate(implementations):
        if each.name == chosen.name:
            continue
        reason = each.why_not(problem) or each.why_not_auto(problem)
        # One that could run, and stands before, was left by the clock, or has nothing to compute.
        passed_over = "comes after" if place > names.index(chosen.name) else "it is right here, and not what is fastest"
        lines.append(f"  {each.name}: {reason or passed_over}")
    return "\n".join(lines)


def _select_forced(
    operator: str, implementations: Sequence[Implementation], problem: Any, backend: str
) -> Implementation:
    for implementation in implementations:
        if implementation.name == backend:
            reason = implementation.why_not(problem)
            if reason is None:
                return implementation
            raise UnsupportedError(
                f"{operator}: backend '{backend}' cannot run this problem: {reason}; {way_out(backend)}"
            )
    has = ", ".join(implementation.name for implementation in implementations)
    raise UnsupportedError(f"{operator}: there is no '{backend}' implementation of it; it has: {has}")


def _checked(backend: str, source: str) -> str:
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def _say_once(operator: str, implementation: Implementation, refusals: list[str], problem: Any) -> None:
    """Log a choice that was not made before; warn where it leaves a GPU to the torch backend."""
    rules = tuple(map(_rule, refusals))
    key = (operator, implementation.name, problem.device.type, *rules)
    if key in _said:
        return
    _said.add(key)
    text = f"{operator}: runs on the {implementation.name} backend ({'; '.join(rules)})"
    _log.debug("%s", text)
    if implementation.name == "torch" and problem.device.type == "cuda":
        warnings.warn(text, stacklevel=_levels_to_the_caller())


@lru_cache(maxsize=1024)
def _rule(refusal: str) -> str:
    """A reason without the value that it refuses."""
    return re.sub(r",? got [^;]*", "", refusal)


def _levels_to_the_caller() -> int:
    """The ``stacklevel`` at which ``_say_once`` points at the first line outside of this package and of torch."""
    torch_folder = str(Path(sys.modules["torch"].__file__ or "").parent)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, torch_folder)):
        frame, level = frame.f_back, level + 1
    return level

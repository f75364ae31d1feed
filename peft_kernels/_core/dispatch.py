"""Choice of a backend at call time, with the reasons for every refusal.

A family lists its implementations in the order ``auto`` tries them. Each answers ``why_not(problem)``; a forced backend
never falls back, and ``auto`` that ends on torch on a CUDA tensor says once why nothing better ran.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from peft_kernels._core.errors import UnsupportedError

BACKENDS = ("torch", "triton", "cuda")
ENVIRONMENT_VARIABLE = "PEFT_KERNELS_BACKEND"

_forced: ContextVar[str | None] = ContextVar("peft_kernels_backend", default=None)
_warned: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Implementation:
    """What one backend of one family can do.

    Attributes:
        name: "torch", "triton" or "cuda".
        why_not_environment: reason why it cannot run in this process at all, or None.
        why_not: reason why it cannot run this problem, or None; implies the environment's reason.
        why_not_auto: reason why ``auto`` passes over it although it can run (never verified on this GPU), or None.
        forward, backward: the family's own signature, the same for all its implementations.
        borrows: backends whose functions do what this one has no kernels for.
    """

    name: str
    why_not_environment: Callable[[], str | None]
    why_not: Callable[[Any], str | None]
    why_not_auto: Callable[[Any], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    borrows: tuple[str, ...] = ()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block.

    Args:
        backend: "torch", "triton" or "cuda"; "auto" undoes an outer block.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> import torch, peft_kernels as pk
        >>> x, w, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
        >>> with pk.use_backend("torch"):
        ...     pk.lora_linear(x, w, a, b).shape
        torch.Size([2, 3])
    """
    token = _forced.set(_checked(backend, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def requested_backend(backend: str | None) -> str:
    """The backend in force: the call's argument, else the ``use_backend`` block, else the environment, else "auto"."""
    if backend is not None:
        return _checked(backend, "backend")
    inside = _forced.get()
    if inside is not None:
        return inside
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def choose(family: str, implementations: Sequence[Implementation], problem: Any, backend: str) -> Implementation:
    """Pick the implementation for a problem.

    Args:
        family: name for messages.
        implementations: in the order ``auto`` tries them; the last is torch and refuses nothing.
        problem: the family's problem description; has ``device``.
        backend: as ``requested_backend`` returns it.

    Raises:
        UnsupportedError: a forced backend cannot run the problem.
    """
    if backend != "auto":
        return _choose_forced(family, implementations, problem, backend)
    refusals: list[str] = []
    for implementation in implementations:
        reason = implementation.why_not(problem) or implementation.why_not_auto(problem)
        if reason is None:
            if refusals and implementation.name == "torch" and problem.device.type == "cuda":
                _warn_once(family, refusals)
            return implementation
        refusals.append(f"{implementation.name}: {reason}")
    raise UnsupportedError(f"{family}: no backend can run this problem ({'; '.join(refusals)})")


def _choose_forced(
    family: str, implementations: Sequence[Implementation], problem: Any, backend: str
) -> Implementation:
    for implementation in implementations:
        if implementation.name == backend:
            reason = implementation.why_not(problem)
            if reason is None:
                return implementation
            raise UnsupportedError(
                f"{family}: backend '{backend}' cannot run this problem: {reason}; backend='torch' or 'auto' can"
            )
    has = ", ".join(implementation.name for implementation in implementations)
    raise UnsupportedError(f"{family}: there is no '{backend}' implementation of it; it has: {has}")


def _checked(backend: str, source: str) -> str:
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def _warn_once(family: str, refusals: list[str]) -> None:
    text = "; ".join(refusals)
    if (family, text) not in _warned:
        _warned.add((family, text))
        warnings.warn(f"{family}: runs on the torch backend ({text})", stacklevel=4)

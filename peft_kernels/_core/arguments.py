"""Checks of what modules are made of; every message names the module, the argument, what it must be and what it was."""

from __future__ import annotations

import math
from numbers import Real

from peft_kernels._core.checks import FLOATING


def integer(owner: str, name: str, value: object, least: int) -> None:
    """Check an int; bool is none.

    Raises:
        ValueError: ``value`` is no int, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}: {name} must be an int of at least {least}, got {value!r}")


def number(owner: str, name: str, value: object) -> None:
    """Check a finite number.

    Raises:
        ValueError: ``value`` is no number, infinite or nan.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be a finite number, got {value!r}")


def probability(owner: str, name: str, value: object) -> None:
    """Check a probability of dropout.

    Raises:
        ValueError: ``value`` is no number in [0, 1).
    """
    if not isinstance(value, Real) or not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{owner}: {name} must be in [0, 1), got {value!r}")


def floating(owner: str, name: str, dtype: object) -> None:
    """Check the dtype of parameters; None is torch's default.

    Raises:
        ValueError: ``dtype`` is none that the operators take.
    """
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(str, FLOATING))}, got {dtype!r}")

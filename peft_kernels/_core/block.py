"""What is in force inside a ``with`` block, or in a function that it decorates."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Block(ContextDecorator):
    """What ``use_backend`` and its like return; warns, with the line that made it, where it goes without being used.

    A block can be entered again after it was left. As a decorator it opens one for each call.

    Args:
        text: the call that made it.
        opening: makes what is entered.
        line: file and number of the caller's.
    """

    # Of one whose __init__ never ran, as copies and compilers make them.
    _used = True

    def __init__(self, text: str, opening: Callable[[], AbstractContextManager[None]], line: tuple[str, int]) -> None:
        self._text, self._opening, self._line = text, opening, line
        self._open: AbstractContextManager[None] | None = None
        self._used = False

    def __enter__(self) -> None:
        if self._open is not None:
            name = self._text.split("(", 1)[0]
            raise RuntimeError(f"{name}: this block is open already; call {name} again for one inside it")
        self._open, self._used = self._opening(), True
        self._open.__enter__()

    def __exit__(self, *raised: Any) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.__exit__(*raised)

    def __call__(self, function: _Function) -> _Function:
        self._used = True
        if _is_left_at_once(function):
            raise ValueError(
                f"{self._text.split('(', 1)[0]}: what it decorates must run when it is called, got {function!r}; "
                f"open the block inside: with {self._text}: ..."
            )
        return super().__call__(function)

    def _recreate_cm(self) -> Block:
        return Block(self._text, self._opening, self._line)

    def __repr__(self) -> str:
        return f"<forces nothing by itself; with {self._text}: ...>"

    # The default stays when a module's names are gone, at the end of a process.
    def __del__(self, warn: Callable[..., None] = warnings.warn_explicit) -> None:
        if not self._used:
            warn(f"{self._text} forced nothing; with {self._text}: ... does", UserWarning, *self._line)

    @staticmethod
    def line_of_the_caller() -> tuple[str, int]:
        """Where the function was called that calls this."""
        if torch.compiler.is_compiling():
            # Where frames cannot be read, and nothing is ever finalized.
            return "<compiled>", 0
        frame = sys._getframe(2)
        return frame.f_code.co_filename, frame.f_lineno


def _is_left_at_once(function: object) -> bool:
    """Whether a call of it returns before its body has run, or, for a class, before its methods do."""
    kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isclass)
    return any(is_one(function) for is_one in kinds)

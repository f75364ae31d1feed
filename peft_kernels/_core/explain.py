"""What a call does, in words: operators and integrations note it while somebody listens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from peft_kernels._core.errors import UnsupportedError

_listener: ContextVar[Counter[str] | None] = ContextVar("peft_kernels_explain", default=None)


def is_heard() -> bool:
    """Whether somebody listens."""
    return _listener.get() is not None


def note(text: Callable[[], str]) -> None:
    """Add to what ``explain`` returns; outside of it the text is not made."""
    listener = _listener.get()
    if listener is not None:
        listener[text()] += 1


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Call a function and describe which backend and path each operation in it took, and why not the others.

    Args:
        fn: one of this package's functions, a module, or anything that calls them. It is called once, with gradients as
            they are enabled; its result is dropped and torch's random generators are set back.
        args, kwargs: what it is called with.

    Returns:
        For each operation a line with its name and backend, and below it a line for each backend that was passed over,
        with the reason, one that starts with "plan:" and says what the call is made of, and one for the path that the
        backend took where it has several; for each layer that ``apply`` left
        to its library the reason. What happened several times stands once, with the count. A refusal
        (UnsupportedError) is part of the text.

    Raises:
        Exception: whatever else the function raises.

    Example:
        >>> import torch, peft_kernels as pk
        >>> x, weight = torch.ones(2, 3), torch.eye(3)
        >>> print(pk.explain(pk.lora_linear, x, weight, weight[:1], weight[:, :1], backend="torch"))
        lora_linear: torch
          backend='torch' is forced
          plan: forward and backward of the torch backend, as one function of autograd
    """
    found: Counter[str] = Counter()
    token = _listener.set(found)
    try:
        with torch.random.fork_rng():
            fn(*args, **kwargs)
    except UnsupportedError as error:
        found[f"refused: {error}"] += 1
    finally:
        _listener.reset(token)
    lines = []
    for text, count in found.items():
        first, *rest = text.split("\n")
        lines += [first if count == 1 else f"{first} ({count} times)", *rest]
    return "\n".join(lines) or "nothing of peft_kernels was called"

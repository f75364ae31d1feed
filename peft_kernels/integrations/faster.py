"""Whether something else is faster, on this machine, than what a fused layer would run.

That is its library's own forward, or for a group of layers the calls of each by itself. On a GPU the clock decides as
it does between implementations, for each class of shapes: `apply` must leave nobody with something slower than he had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels._core import candidates, timing
from peft_kernels._core.cuda_tools import is_capturing
from peft_kernels._core.dispatch import requested_backend
from peft_kernels._core.operator import Operator
from peft_kernels._core.plans import Cache
from peft_kernels.integrations.calls import SUPPORT
from peft_kernels.integrations.sites import library_class

SLOWER = SUPPORT.rule(
    "a call that the library's own forward runs faster on this GPU, when both were timed; `PEFT_KERNELS_TUNE=0`"
    " times nothing",
    "the library's own forward is faster on this machine",
)

_decided: Cache[bool] = Cache()


def is_timed(x: Tensor) -> bool:
    """Whether the clock decides about a call with such an input."""
    return not torch.compiler.is_compiling() and timing.may_decide(x.device)


def is_library_faster(
    layer: nn.Module,
    operator: Operator,
    call: Any,
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    variant: str = "",
) -> bool:
    """Whether ``theirs`` should run a call that is timed, instead of ``ours``.

    Args:
        layer: the fused one.
        operator, call: what it calls, and with what; x is the first argument.
        ours, theirs: x -> y.
        variant: what else both do, beside calls that are alike.
    """
    return _is_slower(operator, call, library_class(layer).__qualname__ + variant, lambda: (ours, theirs), (layer,))


def is_group_slower(
    members: Sequence[nn.Module],
    operator: Operator,
    call: Any,
    runs: Callable[[], tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]],
) -> bool:
    """Whether layers that share an input are faster each by itself, instead of as one operation.

    Args:
        members: the fused layers.
        operator, call: the operation, and what it would be called with; x is the first argument.
        runs: returns the operation and the layers' own calls: x -> tuple of y.
    """
    return _is_slower(operator, call, "alone", runs, members)


def _is_slower(
    operator: Operator,
    call: Any,
    other: str,
    runs: Callable[[], tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]],
    layers: Sequence[nn.Module],
) -> bool:
    """Whether the second of two ways should run a call that is timed; ``other`` is its name."""
    backend = requested_backend(None)
    key = operator.key(call, backend)
    if backend != "auto" or key is None:
        return False
    decided = _decided.get((other, key))
    if decided is None:
        problem = operator.make_problem(call)
        parameters = tuple(parameter for layer in layers for parameter in layer.parameters())
        decided = not problem.is_empty and candidates.is_library_faster(
            operator, problem, call, other, runs(), parameters
        )
        if not is_capturing(problem.device):
            _decided.put((other, key), decided)
    return decided

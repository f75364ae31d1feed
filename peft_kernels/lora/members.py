"""What operators on several frozen weights that share x, the members, have in common: gradients, and ways of a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from peft_kernels._core.autocast import autocast_dtype, without_autocast
from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.kernels import dropout


class Update(NamedTuple):
    """A low-rank update of a member; a member may have several, as where several adapters are active.

    Attributes:
        member: index of the weight.
        lora_a, lora_b, scale: as ``Member``'s.
        dropout_p: in [0, 1).
        lane: fourth word of the mask's counter; another one for each update of a call.
    """

    member: int
    lora_a: Tensor
    lora_b: Tensor
    scale: float | Tensor
    dropout_p: float
    lane: int


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for: of x, of each member's tensors, and of each update's."""

    x: bool
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]
    lora_a: tuple[bool, ...]
    lora_b: tuple[bool, ...]


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of the arguments.

    Of adapters that rows choose, those without rows have zeros in the gradients of the factors.
    """

    x: Tensor | None
    weights: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    lora_a: tuple[Tensor | None, ...]
    lora_b: tuple[Tensor | None, ...]


# A NamedTuple with ``lora_a`` and ``lora_b``.
_Update = TypeVar("_Update", bound=Any)


def cast_for_autocast(
    x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], updates: Sequence[_Update]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...], Sequence[_Update]]:
    """Cast what F.linear would cast; float32 adapters stay."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None or x.dtype == torch.float64:
        return x, weights, biases, updates
    return (
        x.to(dtype),
        # What is no tensor is refused by the checks.
        tuple([weight.to(dtype) if isinstance(weight, Tensor) else weight for weight in weights]),
        tuple([None if bias is None else bias.to(dtype) for bias in biases]),
        [
            update
            if update.lora_a.dtype == torch.float32
            else update._replace(lora_a=update.lora_a.to(dtype), lora_b=update.lora_b.to(dtype))
            for update in updates
        ],
    )


def arguments(x: Tensor, updates: Sequence[Update], seed: int | Tensor | None, operator: str) -> tuple[Any, ...]:
    """What updates are as an operator takes them, from lora_a to lanes, and the seed of their masks."""
    seed_tensor: Tensor | None = None
    if any(dropout.threshold(update.dropout_p, operator) for update in updates):
        seed_tensor = dropout.draw_seed(x.device) if seed is None else dropout.as_seed(seed, x.device, operator)
    return (
        tuple([update.lora_a for update in updates]),
        tuple([update.lora_b for update in updates]),
        tuple([_scale(update.scale, x) for update in updates]),
        tuple([update.member for update in updates]),
        tuple([update.dropout_p for update in updates]),
        tuple([update.lane for update in updates]),
        seed_tensor,
    )


def _scale(scale: float | Tensor, x: Tensor) -> float | Tensor:
    if isinstance(scale, Tensor):
        return scale.to(device=x.device)
    return float(scale) if isinstance(scale, (bool, int)) else scale


def forward(problem: Any, call: Any, implementation: Implementation) -> tuple[Tensor, ...]:
    """An ``Operator``'s: y of each member, and S."""
    flat = call if call.x.dim() == 2 else call._replace(x=call.x.reshape(problem.m, problem.k))
    with without_autocast(problem.device.type):
        *ys, s = implementation.forward(problem, flat)
    leading = call.x.shape[:-1]
    return *(ys if flat is call else [y.view(*leading, n) for y, n in zip(ys, problem.n, strict=True)]), s


def forward_of_given(problem: Any, call: Any, implementation: Implementation) -> tuple[Tensor, Tensor]:
    """An ``Operator``'s that adds to a given y: the sum, and S."""
    # Implementations add in place.
    y = call.y.clone(memory_format=torch.contiguous_format)
    flat = call._replace(y=y.view(problem.m, problem.n), x=call.x.reshape(problem.m, problem.k))
    with without_autocast(problem.device.type):
        s: Tensor = implementation.forward(problem, flat)
    return y, s


def backward(
    problem: Any,
    call: Any,
    kept: tuple[Tensor],
    dys: Sequence[Tensor | None],
    needs: Needs,
    implementation: Implementation,
) -> Gradients:
    """An ``Operator``'s."""
    flat = call if call.x is None else call._replace(x=call.x.reshape(problem.m, problem.k))
    rows = [None if dy is None else dy.reshape(problem.m, n) for dy, n in zip(dys, problem.n, strict=True)]
    with without_autocast(problem.device.type):
        gradients: Gradients = implementation.backward(problem, flat, *kept, rows, needs)
    if gradients.x is None:
        return gradients
    leading = next(dy.shape[:-1] for dy in dys if dy is not None)
    return gradients._replace(x=gradients.x.view(*leading, problem.k))


def backward_of_one(
    problem: Any, call: Any, kept: tuple[Any, ...], dy: Tensor, needs: Any, implementation: Implementation
) -> Any:
    """An ``Operator``'s with one weight and one output, whose x, like dY, may have several leading dimensions."""
    flat = call if call.x is None else call._replace(x=call.x.reshape(problem.m, problem.k))
    with without_autocast(problem.device.type):
        gradients = implementation.backward(problem, flat, *kept, dy.reshape(problem.m, problem.n), needs)
    return gradients if gradients.x is None else gradients._replace(x=gradients.x.view(*dy.shape[:-1], problem.k))


def results(problem: Any, call: Any, width: int) -> tuple[Tensor, ...]:
    """An ``Operator``'s; S has so many columns."""
    ys = [call.x.new_empty((*call.x.shape[:-1], n)) for n in problem.n]
    return *ys, call.x.new_empty((problem.m, width), dtype=problem.wide_dtype)


def reads(needs: Needs) -> Iterable[str]:
    """An ``Operator``'s."""
    if needs.x or any(needs.lora_a):
        yield from ("seed", "lora_b")
    if needs.x:
        yield from ("weights", "lora_a")
    if any(needs.weights) or any(needs.lora_a):
        yield "x"
    if any(needs.lora_b):
        yield "s"


def reached(call: Any, needs: Needs, dys: Sequence[Tensor | None]) -> Needs:
    """An ``Operator``'s: a member whose output nothing is computed from has no gradients."""
    there = [dy is not None for dy in dys]
    if all(there):
        return needs
    of_updates = [there[member] for member in call.members]

    return Needs(
        needs.x,
        both(needs.weights, there),
        both(needs.biases, there),
        both(needs.lora_a, of_updates),
        both(needs.lora_b, of_updates),
    )


def both(needed: Sequence[bool], there: Sequence[bool]) -> tuple[bool, ...]:
    """Which are needed of those that are there."""
    return tuple(need and is_there for need, is_there in zip(needed, there, strict=True))


def by_width(dys: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """Members with their dY, the narrowest first; without those whose dY is None."""
    there = [(member, dy) for member, dy in enumerate(dys) if dy is not None]
    return sorted(there, key=lambda pair: pair[1].shape[1])

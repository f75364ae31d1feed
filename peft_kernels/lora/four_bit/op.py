"""What 4-bit weights of the public functions run, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import Operator
from peft_kernels.four_bit_weight.quant_state import QuantizedWeight
from peft_kernels.lora import members
from peft_kernels.lora.four_bit import cuda_impl, torch_impl, triton_impl
from peft_kernels.lora.four_bit.composite import composite
from peft_kernels.lora.four_bit.problem import NAME, Inputs, LoraFourBitProblem, Needs, flattened, make_problem
from peft_kernels.lora.members import Update


def four_bit_call(
    x: Tensor,
    weights: Sequence[Any],
    biases: tuple[Tensor | None, ...],
    updates: Sequence[Update],
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """``group_call`` on weights that are ``QuantizedWeight``s: W_j is decoded to x's dtype, or autocast's.

    Args:
        x, biases, updates, seed, backend: as ``group_call``'s.
        weights: of one kind and with blocks of one size.

    Returns:
        y_j (..., N_j) of each member.

    Raises:
        ValueError: as ``group_call``; a weight is not 4-bit, of another format than the first, or what ``dequantize``
            refuses.
        UnsupportedError: the forced backend cannot run this problem.
    """
    ys: tuple[Tensor, ...] = OPERATOR(inputs_of(x, weights, biases, updates, seed), backend)
    return ys


def inputs_of(
    x: Tensor,
    weights: Sequence[Any],
    biases: tuple[Tensor | None, ...],
    updates: Sequence[Update],
    seed: int | Tensor | None = None,
) -> Inputs:
    """The same call as the operator takes it."""
    if isinstance(x, Tensor):
        x, _, biases, updates = members.cast_for_autocast(x, (), biases, updates)
    return Inputs(*(x, *flattened(weights), biases, *members.arguments(x, updates, seed, NAME)))


def without_rows(weights: Sequence[Any], name: str) -> tuple[Tensor, ...]:
    """The weights of a call with adapters by row.

    Raises:
        ValueError: one of them is 4-bit.
    """
    if any(isinstance(weight, QuantizedWeight) for weight in weights):
        raise ValueError(f"{name}: rows must be None where a weight is a QuantizedWeight")
    return tuple(weights)


def _reads(needs: Needs) -> Iterable[str]:
    if needs.x or any(needs.lora_a):
        yield from ("seed", "lora_b")
    if needs.x:
        yield from ("packed", "block_scales", "codes", "nested_scales", "lora_a")
    if any(needs.lora_a):
        yield "x"
    if any(needs.lora_b):
        yield "s"


def _reached(call: Inputs, needs: Needs, dys: Sequence[Tensor | None]) -> Needs:
    there = [dy is not None for dy in dys]
    if all(there):
        return needs
    of_updates = [there[member] for member in call.members]
    return Needs(
        needs.x,
        members.both(needs.biases, there),
        members.both(needs.lora_a, of_updates),
        members.both(needs.lora_b, of_updates),
    )


def _results(problem: LoraFourBitProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, ...]:
    return members.results(problem, call, sum(problem.r))


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(cuda_impl.IMPLEMENTATION, triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=members.forward,
    backward=members.backward,
    results=_results,
    composite=composite,
    reads=_reads,
    reached=_reached,
    varying=("m",),
    kept=("s",),
    activations=("x",),
    adds=("biases",),
    several=True,
    addressed=("x", "lora_a"),
)

"""``lora_group``'s implementations on weights that are decoded when they are asked for, and kept by nobody.

A group asks for each weight once in a pass, when its base product's turn comes: so one decoded weight is there at a
time, in the forward pass, and in a backward pass where x needs a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any, overload

from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.four_bit.problem import Gradients, Inputs, LoraFourBitProblem, Needs
from peft_kernels.lora.group.problem import Inputs as GroupInputs
from peft_kernels.lora.members import Gradients as GroupGradients
from peft_kernels.lora.members import Needs as GroupNeeds


class _Decoded(Sequence[Tensor]):
    """Members' weights (N_j, K) in x's dtype, each made anew whenever it is asked for."""

    def __init__(self, problem: LoraFourBitProblem, inputs: Inputs, decoder: Implementation) -> None:
        self._problem, self._inputs, self._decoder = problem, inputs, decoder

    def __len__(self) -> int:
        return len(self._problem.n)

    @overload
    def __getitem__(self, member: int) -> Tensor: ...
    @overload
    def __getitem__(self, member: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, member: Any) -> Any:
        problem = self._problem
        return self._decoder.forward(problem.weights[member], self._inputs.weight(member, problem.dtype))


def on_decoded(
    module: str, group: Implementation, decoder: Implementation, borrows: tuple[str, ...] = ()
) -> Implementation:
    """An implementation of ``lora_group`` on weights that one of ``dequantize`` decodes, as one of a module."""

    @wraps(group.forward)
    def forward(problem: LoraFourBitProblem, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return y_j (M, N_j) of each member, and S (M, sum of r)."""
        ys: tuple[Tensor, ...] = group.forward(problem, group_inputs(inputs, _Decoded(problem, inputs, decoder)))
        return ys

    @wraps(group.backward)
    def backward(
        problem: LoraFourBitProblem, inputs: Inputs, s: Tensor, dys: Sequence[Tensor | None], needs: Needs
    ) -> Gradients:
        """Return the gradients that ``needs`` asks for; a member whose dY is None takes part in none of them."""
        weights, none = _Decoded(problem, inputs, decoder), (False,) * len(problem.n)
        asked = GroupNeeds(needs.x, none, needs.biases, needs.lora_a, needs.lora_b)
        made: GroupGradients = group.backward(problem, group_inputs(inputs, weights), s, dys, asked)
        return Gradients(made.x, made.biases, made.lora_a, made.lora_b)

    def why_not(problem: LoraFourBitProblem) -> str | None:
        return group.why_not(problem) or decoder.why_not(problem.weights[0])

    def slower(problem: LoraFourBitProblem) -> str | None:
        # The group's own checks do not run the decoder.
        return group.slower(problem) or decoder.why_not_auto(problem.weights[0])

    forward.__module__ = backward.__module__ = module
    return Implementation(
        name=group.name,
        forward=forward,
        backward=backward,
        why_not_environment=group.why_not_environment,
        why_not=why_not,
        slower=slower,
        qualification=group.qualification,
        borrows=borrows,
        row_invariant=None
        if group.row_invariant is None
        else on_decoded(module, group.row_invariant, decoder, borrows),
    )


def group_inputs(inputs: Inputs, weights: Sequence[Tensor]) -> GroupInputs:
    """A call of ``lora_group`` on weights that are there, or made when they are asked for."""
    return GroupInputs(
        inputs.x,
        weights,  # type: ignore[arg-type]
        inputs.biases,
        inputs.lora_a,
        inputs.lora_b,
        inputs.scales,
        inputs.members,
        inputs.dropout_p,
        inputs.lanes,
        inputs.seed,
    )

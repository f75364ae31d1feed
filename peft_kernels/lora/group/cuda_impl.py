"""Capability record of the CUDA backend: ``lora_linear``'s kernels, one member after another.

With few tokens these read each weight once and nothing else matters; with many the clock has to say whether they, or
launches that members share, are faster. Their checks are ``lora_linear``'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels._core import extension
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.qualification import Qualification
from peft_kernels.lora.group.problem import Inputs, LoraGroupProblem
from peft_kernels.lora.linear import cuda_impl
from peft_kernels.lora.linear.problem import Gradients as LinearGradients
from peft_kernels.lora.linear.problem import Needs as LinearNeeds
from peft_kernels.lora.members import Gradients, Needs

_LINEAR = cuda_impl.IMPLEMENTATION


def why_not(problem: LoraGroupProblem) -> str | None:
    """Reason why no kernel can run some member, or None."""
    if problem.members != tuple(range(len(problem.n))):
        return f"a launch has one weight and one update, got updates of the members {problem.members}"
    for index, linear in enumerate(problem.linears):
        if linear.has_dropout and linear.lane != 0:
            return f"its masks are those of lane 0, got lane {linear.lane}"
        reason = _LINEAR.why_not(linear)
        if reason is not None:
            return f"members[{index}]: {reason}"
    return None


def slower(problem: LoraGroupProblem) -> str | None:
    """Reason that holds for some member, or None."""
    return next((reason for linear in problem.linears if (reason := _LINEAR.slower(linear)) is not None), None)


def forward(problem: LoraGroupProblem, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (M, N_j) of each member, and S (M, sum of r) float32."""
    results = [_LINEAR.forward(linear, inputs.update(index)) for index, linear in enumerate(problem.linears)]
    return *(y for y, _ in results), torch.cat([s for _, s in results], dim=1)


def backward(
    problem: LoraGroupProblem, inputs: Inputs, s: Tensor, dys: Sequence[Tensor | None], needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for; a member whose dY is None takes part in none of them."""
    asked_for = zip(needs.weights, needs.lora_a, needs.lora_b, needs.biases, strict=True)
    found: list[LinearGradients] = []
    for index, (linear, dy, each) in enumerate(zip(problem.linears, dys, asked_for, strict=True)):
        asked = LinearNeeds(needs.x, *each)
        # Of a member's own S rows are contiguous.
        own = s[:, problem.columns[index]].contiguous() if asked.lora_b else s
        if dy is not None and any(asked):
            found.append(_LINEAR.backward(linear, inputs.update(index), own, dy, asked))
        else:
            found.append(LinearGradients(*[None] * len(asked)))
    dx: Tensor | None = None
    for gradients in found:
        if gradients.x is not None:
            dx = gradients.x if dx is None else dx.add_(gradients.x)
    return Gradients(
        dx,
        tuple(gradients.weight for gradients in found),
        tuple(gradients.bias for gradients in found),
        tuple(gradients.lora_a for gradients in found),
        tuple(gradients.lora_b for gradients in found),
    )


def _qualification() -> Qualification:
    checked = _LINEAR.qualification
    assert checked is not None

    def touched(problem: LoraGroupProblem) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part for linear in problem.linears for part in checked.touched(linear)))

    return dataclasses.replace(checked, touched=touched)


IMPLEMENTATION = Implementation(
    name="cuda",
    why_not_environment=extension.why_not,
    why_not=why_not,
    slower=slower,
    qualification=_qualification(),
    forward=forward,
    backward=backward,
)

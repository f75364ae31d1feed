"""A gain on a linear layer with torch alone, by the steps of ``lora_gain``'s torch backend.

Forward   P = x W^T + bias;  y = g * P, rounded once
Backward  dX = dY (g * W), or (g * dY) W where that has fewer elements;  dg = sum over rows of dY * P
          dW = (g * dY)^T x;  dbias = g * sum dY
Saved     x where dW is to come, and P (M, N). Not y: a gain of zero has nothing left of P, and a caller may write to y
Temporary g * W or g * dY in x's dtype; one activation in float32, a block of rows at a time, where the gain is float32
          beside half precision on a CPU
Refused   nothing
"""

from __future__ import annotations

from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.gain import torch_impl as gain
from peft_kernels.lora.gain_alone.problem import Gradients, Inputs, LoraGainAloneProblem, Needs
from peft_kernels.lora.linear import torch_steps as steps


def forward(problem: LoraGainAloneProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and P (M, N)."""
    product = steps.base(inputs.x, inputs.weight, inputs.bias)
    return gain.times_columns(problem, product, inputs.gain), product


def backward(
    problem: LoraGainAloneProblem, inputs: Inputs, product: Tensor | None, dy: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    sums = gain.column_sums(problem, dy, product) if needs.gain else None
    dbias = dy.sum(0, dtype=problem.wide_dtype) if needs.bias else None
    return gradients(problem, inputs, dy, needs, sums, dbias)


def gradients(
    problem: LoraGainAloneProblem,
    inputs: Inputs,
    dy: Tensor,
    needs: Needs,
    sums: Tensor | None,
    of_rows: Tensor | None,
) -> Gradients:
    """The gradients, of sums over rows of dY * P and of dY, where they are needed."""
    scaled = gain.scaled_gradient(problem, dy, inputs.gain, needs)
    dx = steps.base_gradient(*gain.base_factors(problem, inputs, dy, scaled)) if needs.x else None
    return Gradients(
        x=dx,
        weight=scaled.t() @ inputs.x if scaled is not None and needs.weight else None,
        gain=None if sums is None else sums.to(problem.gain_dtype),
        bias=None if of_rows is None else (of_rows * inputs.gain).to(problem.dtype),
    )


IMPLEMENTATION = Implementation("torch", forward, backward)

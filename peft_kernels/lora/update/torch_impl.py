"""LoRA update with torch alone, by the steps of ``lora_linear``'s torch backend.

Forward   S = drop(x) A^T;  y += scale S B^T, in place
Backward  dS = scale dY B;  dB = scale dY^T S;  dX = drop'(dS A);  dA = dS^T drop(x)
Tensors   as problem.Inputs; S (M, r) float32, or float64 with x
Saved     x, S and the seed; never y, a mask, a dropped or cast copy of x
Temporary as linear/torch_steps.py, which has the steps
Refused   nothing
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.linear import torch_steps as steps
from peft_kernels.lora.linear.problem import Needs as LinearNeeds
from peft_kernels.lora.update.problem import Gradients, Inputs, LoraUpdateProblem, Needs


def forward(problem: LoraUpdateProblem, inputs: Inputs) -> Tensor:
    """Add to y (M, N), and return S (M, r)."""
    linear = inputs.linear
    s = steps.down(problem.of_x, linear)
    steps.add_update(problem.of_y, inputs.y, s, linear.lora_b.t(), linear.scale)
    return s.to(problem.wide_dtype)


def backward(problem: LoraUpdateProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    linear, asked = inputs.linear, LinearNeeds(needs.x, False, needs.lora_a, needs.lora_b, False)
    ds, db = steps.grad_up(problem.of_y, linear, s, dy, asked)
    dx = da = None
    if ds is not None and needs.x and not problem.of_x.has_dropout:
        dx = steps.update_of(problem.of_x, ds, inputs.lora_a, 1.0, None)
    elif ds is not None and needs.x:
        dx = torch.zeros(problem.m, problem.k, dtype=problem.dtype, device=problem.device)
    if ds is not None and (needs.lora_a or problem.of_x.has_dropout):
        # What has been made of dX without a mask is not added again.
        da = steps.grad_down(problem.of_x, linear, ds, dx if problem.of_x.has_dropout else None, asked)
    return Gradients(x=dx, lora_a=da, lora_b=db)


IMPLEMENTATION = Implementation("torch", forward, backward)

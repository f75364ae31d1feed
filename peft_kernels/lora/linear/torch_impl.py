"""LoRA linear with torch alone, as a very good user would write it: a backend in its own right, on any device.

Forward   S = drop(x) A^T;  y = bias + scale S B^T;  y += x W^T, in place; or the base product first
Backward  dS = scale dY B;  dB = scale dY^T S;  dX = drop'(dS A) + dY W likewise;  dA = dS^T drop(x)
Tensors   as problem.Inputs; S (M, r) float32, or float64 with x
Saved     x, S and the seed; never a mask, never a dropped or cast copy of x
Temporary as torch_steps.py, which has the steps
Refused   nothing; with rows that have the same bits in any batch, whatever is not on a CPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from peft_kernels._core.dispatch import ROW_INVARIANT, Implementation
from peft_kernels._core.row_products import NOT_ON_A_CPU
from peft_kernels.lora.linear import torch_steps as steps
from peft_kernels.lora.linear.problem import Gradients, Inputs, LoraLinearProblem, Needs, of_row_invariant


def forward(problem: LoraLinearProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, r)."""
    s = steps.down(problem, inputs)
    return steps.up(problem, inputs, s), s.to(problem.wide_dtype)


def backward(problem: LoraLinearProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    dx = da = db = None
    if needs.x or needs.lora_a or needs.lora_b:
        ds, db = steps.grad_up(problem, inputs, s, dy, needs)
        if ds is not None and needs.x and steps.adds_base_last(problem) and not problem.has_dropout:
            # Of dX eager torch, too, rounds each part in any dtype.
            dx = steps.update_of(problem, ds, inputs.lora_a, 1.0, None).addmm_(dy, inputs.weight)
            da = steps.grad_down(problem, inputs, ds, None, needs)
        elif ds is not None:
            if needs.x:
                dx = steps.base_gradient(dy, inputs.weight, problem.row_invariant)
            da = steps.grad_down(problem, inputs, ds, dx, needs)
    return Gradients(
        x=dx,
        weight=dy.t() @ inputs.x if needs.weight else None,
        lora_a=da,
        lora_b=db,
        bias=dy.sum(0) if needs.bias else None,
    )


def row_invariant_form(forward: Callable[..., Any], backward: Callable[..., Any]) -> Implementation:
    """A torch backend of this family with rows that have the same bits in any batch."""
    return Implementation(
        "torch" + ROW_INVARIANT,
        of_row_invariant(forward),
        of_row_invariant(backward),
        why_not=lambda problem: (
            None if problem.device.type == "cpu" else f"{NOT_ON_A_CPU}; the Triton kernels keep one"
        ),
    )


IMPLEMENTATION = Implementation("torch", forward, backward, row_invariant=row_invariant_form(forward, backward))

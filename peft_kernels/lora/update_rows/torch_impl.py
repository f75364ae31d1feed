"""LoRA's update of a given y by rows with torch alone, by the steps of ``lora_rows``' torch backend.

Forward   for each slot t on its rows: S = drop(x) A_t^T, y += scale_t S B_t^T, in place
Backward  for each slot on its rows: dS = scale_t dY B_t, dX = drop'(dS A_t), dA_t = dS^T drop(x), dB_t = scale_t dY^T S
Tensors   as problem.Inputs; S (M, width) float32, or float64 with x, its rows in the order of ``order``
Saved     x, S and the seed; never y, a mask, a dropped or cast copy of x
Temporary as rows/torch_impl.py, which has the steps
Refused   nothing
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.rows import torch_impl as rows
from peft_kernels.lora.update.problem import Gradients, Needs
from peft_kernels.lora.update_rows.problem import Inputs, LoraUpdateRowsProblem


def forward(problem: LoraUpdateRowsProblem, inputs: Inputs) -> Tensor:
    """Add to y (M, N), and return S (M, width)."""
    return rows.add_updates(problem.by_rows, inputs.by_rows, (inputs.y,))


def backward(problem: LoraUpdateRowsProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    # Rows without an adapter have none.
    dx = torch.zeros(problem.m, problem.k, dtype=problem.dtype, device=problem.device) if needs.x else None
    (da,), (db,) = rows.gradients_of_updates(problem.by_rows, inputs.by_rows, s, (dy,), needs.of_members, dx)
    return Gradients(dx, da, db)


IMPLEMENTATION = Implementation("torch", forward, backward)

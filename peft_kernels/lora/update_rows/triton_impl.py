"""Capability record of the Triton backend; its launches, and their order, are ``lora_rows``'."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.rows import triton_impl as rows
from peft_kernels.lora.update.problem import Gradients, Needs
from peft_kernels.lora.update_rows.problem import Inputs, LoraUpdateRowsProblem
from peft_kernels.lora.update_rows.qualification import TRITON


def why_not(problem: LoraUpdateRowsProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    return rows.why_not(problem.by_rows)


def forward(problem: LoraUpdateRowsProblem, inputs: Inputs) -> Tensor:
    """Add to y (M, N), and return S (M, width) float32."""
    launches = rows.Launches.of(problem.by_rows, inputs.by_rows)
    s = launches.down()
    launches.add_updates((inputs.y,), s)
    return s


def backward(problem: LoraUpdateRowsProblem, inputs: Inputs, s: Tensor, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    # Rows without an adapter have none.
    dx = torch.zeros(problem.m, problem.k, dtype=problem.dtype, device=problem.device) if needs.x else None
    (da,), (db,) = rows.gradients_of_updates(problem.by_rows, inputs.by_rows, s, (dy,), needs.of_members, dx)
    return Gradients(dx, da, db)


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
)

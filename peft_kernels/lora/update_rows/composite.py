"""LoRA's update of a given y by rows by torch's differentiable operations, for torch.func, tracers, dispatch modes."""

from __future__ import annotations

from torch import Tensor

from peft_kernels.lora.rows import composite as rows
from peft_kernels.lora.update_rows.problem import Inputs, LoraUpdateRowsProblem


def composite(problem: LoraUpdateRowsProblem, call: Inputs) -> Tensor:
    """Return y (..., N) with its updates."""
    (y,) = rows.updated(problem.by_rows, call.by_rows, [call.y])
    # A result is never the argument itself.
    return y.clone() if y is call.y else y

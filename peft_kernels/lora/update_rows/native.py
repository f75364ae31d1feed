"""LoRA's update of a given y by rows by torch's own operators, without a graph, where the host's time is most of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peft_kernels.lora.rows.native import add_updates, is_native
from peft_kernels.lora.update_rows.problem import Inputs, LoraUpdateRowsProblem


def native(problem: LoraUpdateRowsProblem, call: Inputs, records: bool) -> Callable[[Inputs], Tensor] | None:
    """The form for calls like this, as ``lora_rows`` has one, or None; refused are two dtypes beside that."""
    if problem.y_dtype != problem.dtype or not is_native(problem.by_rows, call.by_rows, records):
        return None
    return lambda call: _added(problem, call)


def _added(problem: LoraUpdateRowsProblem, call: Inputs) -> Tensor:
    y = call.y.clone(memory_format=torch.contiguous_format)
    add_updates(problem.by_rows, call.by_rows, (y,))
    return y

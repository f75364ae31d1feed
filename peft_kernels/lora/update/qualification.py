"""The problems by which a machine checks the kernels of `lora_update`, which are `lora_linear`'s, and eager torch.

A part is as ``lora.qualification`` has it. Where y and x have two dtypes, no launch reads both: that of each with the
factors' is a part of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core.qualification import Draw, Family, Qualification, double
from peft_kernels.lora import qualification as linear
from peft_kernels.lora.update.problem import NAME, Inputs, LoraUpdateProblem


def _make(case: linear.Case, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    call, dy = linear.FAMILY.make(case, device, seed)
    y = Draw(device, seed + 1).normal(case.dtype, case.m, case.n)
    return Inputs(call.x, y, call.lora_a, call.lora_b, call.scale, call.dropout_p, call.seed), dy


def _eager(call: Inputs) -> Tensor:
    return (call.y + linear.eager_update(call)).to(call.y.dtype)


def _touched(problem: LoraUpdateProblem) -> tuple[str, ...]:
    on_y = linear.TRITON.touched(problem.of_y) if problem.y_dtype != problem.dtype else ()
    return *linear.TRITON.touched(problem.of_x), *on_y


TRITON = Qualification(
    Family(NAME, _make, _eager, double),
    linear.TRITON.parts,
    _touched,
    linear.TRITON.cases,
    quick=("bfloat16+float32 r16 dropout",),
)

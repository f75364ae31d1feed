"""The problems by which a machine checks the kernels of `lora_update_rows`, which are `lora_rows`', and eager torch.

A part is as ``lora.qualification`` has it. Where y and x have two dtypes, no launch reads both: that of each with the
factors' is a part of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from peft_kernels._core.qualification import Draw, Family, Qualification, double
from peft_kernels.lora import qualification as linear
from peft_kernels.lora.update_rows.problem import NAME, Inputs, LoraUpdateRowsProblem


def _make(case: linear.RowsCase, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    call, (dy, *_) = linear.ROWS.family.make(case, device, seed)
    y = Draw(device, seed + 1).normal(case.dtype, case.m, case.n[0])
    update = Inputs(
        x=call.x,
        y=y,
        lora_a=call.lora_a[0],
        lora_b=call.lora_b[0],
        scales=call.scales[0],
        table=call.tables[0],
        host_table=call.host_tables[0],
        width=call.widths[0],
        slot=call.slot,
        order=call.order,
        first=call.first,
        runs=call.runs,
        seed=call.seed,
    )
    return update, dy


def _eager(call: Inputs) -> Tensor:
    return linear.eager_rows_update(call.y, call.by_rows, 0)


def _touched(problem: LoraUpdateRowsProblem) -> tuple[str, ...]:
    of_x = problem.by_rows
    on_y = () if problem.y_dtype == problem.dtype else linear.ROWS.touched(replace(of_x, dtype=problem.y_dtype))
    return *linear.ROWS.touched(of_x), *on_y


TRITON = Qualification(
    Family(NAME, _make, _eager, double),
    linear.ROWS.parts,
    _touched,
    linear.ROWS.cases,
    quick=("bfloat16+float32 r32 dropout",),
)

"""The problems by which a machine checks `lora_gain_alone`'s kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.qualification import PAIRS, Draw, Family, Qualification, double, dtype_name, dtypes_of
from peft_kernels.lora.gain_alone.problem import NAME, Inputs, LoraGainAloneProblem


@dataclass(frozen=True)
class Case:
    """One problem."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    gain_dtype: torch.dtype
    bias: bool

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} {dtype_name(self.dtype, self.gain_dtype)}"


def _make(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    draw = Draw(device, seed)
    call = Inputs(
        x=draw.normal(case.dtype, case.m, case.k),
        weight=draw.normal(case.dtype, case.n, case.k, std=case.k**-0.5),
        gain=draw.normal(case.gain_dtype, case.n),
        bias=draw.normal(case.dtype, case.n) if case.bias else None,
    )
    return call, draw.normal(case.dtype, case.m, case.n)


def _eager(call: Inputs) -> Tensor:
    """PEFT's (IA)^3."""
    return (F.linear(call.x, call.weight, call.bias) * call.gain).to(call.x.dtype)


def _touched(problem: LoraGainAloneProblem) -> tuple[str, ...]:
    return (dtype_name(problem.dtype, problem.gain_dtype),)


def _cases(part: str, hardware: Hardware) -> Sequence[Any]:
    dtype, gain = dtypes_of(part)
    return (
        Case(64 * hardware.sm_count + 12, 136, 136, dtype, gain, bias=True),
        Case(45, 151, 603, dtype, gain, bias=False),
    )


TRITON = Qualification(
    Family(NAME, _make, _eager, double), tuple(PAIRS), _touched, _cases, quick=("bfloat16", "float16+float32")
)

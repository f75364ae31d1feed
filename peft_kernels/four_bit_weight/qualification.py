"""Problems by which a machine checks `four_bit_dequantize`'s kernel, and eager torch beside it.

A part is a kind and a dtype. Its problems end within a byte and within a block, have blocks that are shorter and longer
than what a program decodes, and scales of both levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.qualification import Draw, Family, Qualification, dtype_name
from peft_kernels.four_bit_weight.composite import composite
from peft_kernels.four_bit_weight.kernels.formats import FORMATS
from peft_kernels.four_bit_weight.problem import NAME, DequantizeProblem, Inputs, make_problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One problem; ``second`` is the nested block, 0 where there is none."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    second: int = 0

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.kind} {shape} {dtype_name(self.dtype)} block{self.block} nested{self.second}"


def _make(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    draw, n = Draw(device, seed), torch.Size(case.shape).numel()
    blocks = -(-n // case.block)

    def codes(least: int, end: int, count: int) -> Tensor:
        return torch.randint(least, end, (count,), generator=draw.generator).to(device, torch.uint8)

    packed, code, second = codes(0, 256, (n + 1) // 2), None, None
    offset: float | Tensor = 0.0
    global_scale: float | Tensor = 1.0
    if FORMATS[case.kind].scale == "e8m0":
        scales = codes(120, 134, blocks)
    elif FORMATS[case.kind].scale == "e4m3":
        # Neither signs nor nan, and few bits, so that half precision holds what comes of them.
        scales, global_scale = codes(40, 80, blocks), torch.full((), 0.37, device=device)
    elif case.second:
        scales, code = codes(0, 256, blocks), draw.normal(torch.float32, 256)
        second = draw.normal(torch.float32, -(-blocks // case.second), std=0.1)
        offset = torch.full((), 0.7, device=device)
    else:
        scales = draw.normal(torch.float32, blocks)
    call = Inputs(
        packed, scales, code, second, offset, global_scale, case.kind, case.shape, case.dtype, case.block, case.second
    )
    return call, draw.normal(case.dtype, *case.shape)


def _eager(call: Inputs) -> Tensor:
    return composite(make_problem(call), call)


def _exact(call: Any) -> Any:
    """The operator computes all in float64 where W is float64."""
    return call._replace(dtype=torch.float64)


FAMILY = Family(NAME, _make, _eager, _exact)


def _part(kind: str, dtype: torch.dtype) -> str:
    return f"{kind} {str(dtype).removeprefix('torch.')}"


def _touched(problem: DequantizeProblem) -> tuple[str, ...]:
    return (_part(problem.kind, problem.dtype),)


def _cases(part: str, hardware: Hardware) -> Sequence[Case]:
    kind, name = part.split()
    dtype = getattr(torch, name)
    if FORMATS[kind].is_fixed:
        block = FORMATS[kind].block_size
        return Case(kind, (67, 5, 3 * block), dtype, block), Case(kind, (256, 512), dtype, block)
    return (
        Case(kind, (67, 333), dtype, 64),
        Case(kind, (300, 512), dtype, 64, 256),
        Case(kind, (101, 515), dtype, 8192, 4),
        Case(kind, (64, 1024), dtype, 128),
    )


TRITON = Qualification(
    FAMILY,
    tuple(_part(kind, dtype) for kind in FORMATS for dtype in DTYPES),
    _touched,
    _cases,
    quick=("nf4 float32", "nf4 bfloat16", "mxfp4 bfloat16", "nvfp4 float16"),
)

"""The problems by which a machine checks `bottleneck_adapter`'s kernels, and eager torch beside them.

A part is the dtypes and the block that the width falls into, or an activation, which is the same function of float32
registers in every kernel. Of a part's problems the tall one has rows enough for one launch of both products, and the
ragged one so few that each has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.qualification import PAIRS, Draw, Family, Qualification, block_of, double, dtype_name, dtypes_of
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.problem import NAME, BottleneckAdapterProblem, Inputs

_BLOCKS = (16, 32, 64, 128)

# A width for the tall and the ragged problem of each block.
_WIDTHS = {"16": (16, 11), "32": (32, 27), "64": (64, 48), "128": (128, 100), "more": (192, 130)}


@dataclass(frozen=True)
class Case:
    """One problem; its residual is "x", "tensor", "wide" (float32 beside a half-precision x) or "none"."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    activation: str = "gelu"
    residual: str = "x"
    is_plain: bool = False

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32 if self.residual == "wide" else self.dtype

    def __str__(self) -> str:
        dtypes = dtype_name(self.dtype, self.adapter_dtype)
        return f"{self.m}x{self.n}x{self.k} r{self.r} {dtypes} {self.activation} residual {self.residual}"


def _make(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    """The branch is about as large as the residual."""
    draw, adapter = Draw(device, seed), case.adapter_dtype
    call = Inputs(
        x=draw.normal(case.dtype, case.m, case.k),
        down_weight=draw.normal(adapter, case.r, case.k, std=case.k**-0.5),
        up_weight=draw.normal(adapter, case.n, case.r, std=case.r**-0.5),
        down_bias=None if case.is_plain else draw.normal(adapter, case.r),
        up_bias=None if case.is_plain else draw.normal(adapter, case.n),
        residual=draw.normal(case.out_dtype, case.m, case.n) if case.residual in ("tensor", "wide") else None,
        serial=case.residual == "x",
        activation=case.activation,
        scale=0.75 if case.is_plain else torch.tensor(0.75, device=device),
    )
    return call, draw.normal(case.out_dtype, case.m, case.n)


def _eager(call: Inputs) -> Tensor:
    """Linear, activation, linear and a sum: x in the adapter's dtype, and the sum in the residual's, or in x's."""
    residual = call.x if call.serial else call.residual
    hidden = ACTIVATIONS[call.activation].value(
        F.linear(call.x.to(call.down_weight.dtype), call.down_weight, call.down_bias)
    )
    branch = F.linear(hidden, call.up_weight, call.up_bias) * call.scale
    return branch.to(call.x.dtype) if residual is None else (residual + branch).to(residual.dtype)


FAMILY = Family(NAME, _make, _eager, double)

_DTYPES = (*PAIRS, "bfloat16+tf32", "float16+tf32")
_TRITON = {
    f"{pair}{' wide' * is_wide} r{block}": (pair, is_wide, block)
    for pair in _DTYPES
    for is_wide in ((False, True) if pair.startswith(("bfloat16", "float16")) else (False,))
    for block in _WIDTHS
}


def _triton_touched(problem: BottleneckAdapterProblem) -> tuple[str, ...]:
    dtypes, is_wide = dtype_name(problem.dtype, problem.adapter_dtype), problem.out_dtype != problem.dtype
    return f"{dtypes}{' wide' * is_wide} r{block_of(problem.r, _BLOCKS)}", problem.activation


def _triton_cases(part: str, hardware: Hardware) -> Sequence[Case]:
    if part in ACTIVATIONS:
        float32, half = torch.float32, torch.float16
        return (
            Case(48 * hardware.sm_count + 12, 72, 72, 16, half, half, part),
            Case(45, 72, 72, 16, float32, float32, part),
        )
    pair, is_wide, block = _TRITON[part]
    (dtype, adapter), (whole, some) = dtypes_of(pair), _WIDTHS[block]
    others = ("wide", "wide") if is_wide else ("x", "tensor")
    return (
        # Three quarters of the multiprocessors have 64 rows.
        Case(48 * hardware.sm_count + 12, 136, 136, whole, dtype, adapter, residual=others[0]),
        Case(45, 151, 603, some, dtype, adapter, "relu", residual=others[1], is_plain=True),
    )


TRITON = Qualification(
    FAMILY,
    (*_TRITON, *ACTIVATIONS),
    _triton_touched,
    _triton_cases,
    quick=("float32 r64", "float16 r64", "bfloat16 r64", "bfloat16+float32 r64", "relu", "gelu"),
)

_CUDA = {f"{half} r{block}": (half, block) for half in ("bfloat16", "float16") for block in ("64", "128")}


def _cuda_touched(problem: BottleneckAdapterProblem) -> tuple[str, ...]:
    return f"{dtype_name(problem.dtype)} r{block_of(problem.r, (64, 128))}", problem.activation


def _cuda_cases(part: str, hardware: Hardware) -> Sequence[Case]:
    if part in ACTIVATIONS:
        return (Case(70, 136, 136, 24, torch.float16, torch.float16, part),)
    half, block = _CUDA[part]
    (dtype, _), (whole, some) = dtypes_of(half), _WIDTHS[block]
    return (
        # Clusters of one block, and of as many as there are chunks of columns.
        Case(64 * hardware.sm_count + 12, 136, 136, whole, dtype, dtype),
        Case(45, 152, 1032, some, dtype, dtype, "relu", residual="tensor", is_plain=True),
        Case(5, 520, 520, some, dtype, dtype, "silu"),
    )


CUDA = Qualification(
    FAMILY, (*_CUDA, *ACTIVATIONS), _cuda_touched, _cuda_cases, quick=("bfloat16 r64", "relu", "gelu"), alone=True
)

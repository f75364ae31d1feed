"""The problems by which a machine checks `adapter_rows`' kernels, and eager torch beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.qualification import PAIRS, Draw, Family, Qualification, block_of, double, dtype_name, dtypes_of
from peft_kernels._core.rows import Rows
from peft_kernels._core.slots import firsts_of, table_of
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.rows.problem import NAME, AdapterRowsProblem, Inputs

_BLOCKS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Case:
    """One problem; its residual is "x", "tensor", "wide" (float32 beside a half-precision x) or "none"."""

    m: int
    n: int
    k: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    activation: str = "gelu"
    residual: str = "x"
    is_plain: bool = False

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32 if self.residual == "wide" else self.dtype

    def __str__(self) -> str:
        dtypes, ranks = dtype_name(self.dtype, self.adapter_dtype), "+".join(map(str, self.ranks))
        return f"{self.m}x{self.n}x{self.k} r{ranks} {dtypes} {self.activation} residual {self.residual}"


def _make(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    """Neighbours have other slots, some rows none, and no two slots as many."""
    draw, adapter, slots, total = Draw(device, seed), case.adapter_dtype, len(case.ranks), sum(case.ranks)
    number = torch.arange(case.m) * 5 // 3
    rows = Rows.of(torch.minimum(number % (slots + 2), number % (slots + 1)) - 1, known=slots, device=device)
    call = Inputs(
        x=draw.normal(case.dtype, case.m, case.k),
        down_weight=draw.normal(adapter, total, case.k, std=case.k**-0.5),
        up_weight=draw.normal(adapter, case.n, total, std=max(case.ranks) ** -0.5),
        down_bias=None if case.is_plain else draw.normal(adapter, total),
        up_bias=None if case.is_plain else draw.normal(adapter, slots, case.n),
        residual=draw.normal(case.out_dtype, case.m, case.n) if case.residual in ("tensor", "wide") else None,
        serial=case.residual == "x",
        activation=case.activation,
        scales=torch.linspace(0.5, 1.0, slots, device=device),
        table=table_of(case.ranks, device),
        ranks=case.ranks,
        slot=rows.slot,
        order=rows.order,
        first=rows.first,
        runs=rows.runs,
    )
    return call, draw.normal(case.out_dtype, case.m, case.n)


def _eager(call: Inputs) -> Tensor:
    """Linear, activation, linear and a sum for each slot's rows."""
    given = call.x if call.serial else call.residual
    n, x = call.up_weight.shape[0], call.x.to(call.down_weight.dtype)
    residual = call.x.new_zeros(call.x.shape[0], n) if given is None else given
    y, act = residual, ACTIVATIONS[call.activation].value
    for t, (first, rank) in enumerate(zip(firsts_of(call.ranks), call.ranks, strict=True)):
        rows, mine = (call.slot == t).nonzero().squeeze(1), slice(first, first + rank)
        if rank == 0:
            continue
        down_bias = None if call.down_bias is None else call.down_bias[mine]
        h = act(F.linear(x[rows], call.down_weight[mine], down_bias))
        branch = (
            F.linear(h, call.up_weight[:, mine], None if call.up_bias is None else call.up_bias[t]) * call.scales[t]
        )
        y = y.index_copy(0, rows, (residual[rows] + branch).to(y.dtype))
    return y


FAMILY = Family(NAME, _make, _eager, double)

_RANKS = {
    "16": ((16, 3, 0), (11, 16)),
    "32": ((32, 8), (27, 4, 32)),
    "64": ((64, 16), (48, 5)),
    "128": ((128,), (100, 8)),
}
_TRITON = {
    f"{pair}{' wide' * is_wide} r{block}": (pair, is_wide, block)
    for pair in (*PAIRS, "bfloat16+tf32", "float16+tf32")
    for is_wide in ((False, True) if pair.startswith(("bfloat16", "float16")) else (False,))
    for block in _RANKS
}


def _touched(problem: AdapterRowsProblem) -> tuple[str, ...]:
    dtypes, is_wide = dtype_name(problem.dtype, problem.adapter_dtype), problem.out_dtype != problem.dtype
    return f"{dtypes}{' wide' * is_wide} r{block_of(problem.width, _BLOCKS)}", problem.activation


def _cases(part: str, hardware: Hardware) -> Sequence[Case]:
    if part in ACTIVATIONS:
        float32, half = torch.float32, torch.float16
        return (
            Case(48 * hardware.sm_count + 12, 72, 72, (16, 8), half, half, part),
            Case(45, 72, 72, (16, 8), float32, float32, part),
        )
    pair, is_wide, block = _TRITON[part]
    (dtype, adapter), (some, others) = dtypes_of(pair), _RANKS[block]
    residuals = ("wide", "wide") if is_wide else ("x", "tensor")
    return (
        Case(48 * hardware.sm_count + 12, 136, 136, some, dtype, adapter, residual=residuals[0]),
        Case(45, 151, 603, others, dtype, adapter, "relu", residual=residuals[1], is_plain=True),
    )


TRITON = Qualification(
    FAMILY,
    (*_TRITON, *ACTIVATIONS),
    _touched,
    _cases,
    quick=("float32 r64", "float16 r64", "bfloat16 r64", "bfloat16+float32 r64", "relu", "gelu"),
)

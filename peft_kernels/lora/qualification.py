"""The problems by which a machine checks the kernels of `lora_linear`, `lora_group` and `lora_rows`, and eager torch.

A part is the dtypes, the block that the rank falls into, and whether there is dropout. Of its problems the tall one
has more blocks of rows than there are multiprocessors, and rows that vectors can read; nothing of the ragged one is a
multiple of anything, and its reductions are split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.qualification import PAIRS, Draw, Family, Qualification, block_of, double, dtype_name, dtypes_of
from peft_kernels._core.rows import Rows
from peft_kernels.lora.group.problem import NAME as GROUP_NAME
from peft_kernels.lora.group.problem import Inputs as GroupInputs
from peft_kernels.lora.group.problem import LoraGroupProblem
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.linear.problem import NAME, Inputs, LoraLinearProblem
from peft_kernels.lora.rows.problem import NAME as ROWS_NAME
from peft_kernels.lora.rows.problem import Inputs as RowsInputs
from peft_kernels.lora.rows.problem import LoraRowsProblem

_SEED = 20240229
_P = 0.1
_BLOCKS = (16, 32, 64)

# A rank for the tall and the ragged problem of each block: the whole block, and a part of it.
_RANKS = {"16": (16, 11), "32": (32, 27), "64": (64, 59), "more": (96, 130)}


@dataclass(frozen=True)
class Case:
    """One problem; ``is_plain`` leaves out the bias and has a float for a scale."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    p: float = 0.0
    is_plain: bool = False

    def __str__(self) -> str:
        dtypes = dtype_name(self.dtype, self.adapter_dtype)
        return f"{self.m}x{self.n}x{self.k} r{self.r} {dtypes}{f' p{self.p}' * (self.p > 0)}"


def _make(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    """The low-rank term is about as large as the base product."""
    draw = Draw(device, seed)
    call = Inputs(
        x=draw.normal(case.dtype, case.m, case.k),
        weight=draw.normal(case.dtype, case.n, case.k, std=case.k**-0.5),
        lora_a=draw.normal(case.adapter_dtype, case.r, case.k, std=case.k**-0.5),
        lora_b=draw.normal(case.adapter_dtype, case.n, case.r, std=case.r**-0.5),
        scale=0.75 if case.is_plain else torch.tensor(0.75, device=device),
        bias=None if case.is_plain else draw.normal(case.dtype, case.n),
        dropout_p=case.p,
        seed=dropout.as_seed(_SEED + seed, device) if case.p else None,
    )
    return call, draw.normal(case.dtype, case.m, case.n)


def _eager(call: Inputs, lane: int = 0) -> Tensor:
    """What PEFT's layer computes, with the mask of this package: x in the adapters' dtype, and the sum in the wider."""
    result = F.linear(call.x, call.weight, call.bias)
    return (result + eager_update(call, lane)).to(result.dtype)


def eager_update(call: Any, lane: int = 0) -> Tensor:
    """The low-rank update of a call that has x, its factors, scale and dropout, in the factors' dtype."""
    x = call.x.to(call.lora_a.dtype)
    if call.seed is not None:
        limit = dropout.threshold(call.dropout_p)
        keep = dropout.keep_mask(call.seed, x.shape[0], x.shape[1], limit, lane)
        # nn.Dropout rounds the factor to the dtype before it multiplies.
        x = x * keep.to(x.dtype).mul_(dropout.keep_scale(limit))
    return F.linear(F.linear(x, call.lora_a), call.lora_b) * call.scale


FAMILY = Family(NAME, _make, _eager, double)

_TRITON = {
    f"{pair} r{block}{' dropout' * has_dropout}": (pair, block, has_dropout)
    for pair in PAIRS
    for block in _RANKS
    for has_dropout in (False, True)
}


def _triton_touched(problem: LoraLinearProblem) -> tuple[str, ...]:
    dtypes, block = dtype_name(problem.dtype, problem.adapter_dtype), block_of(problem.r, _BLOCKS)
    return (f"{dtypes} r{block}{' dropout' * problem.has_dropout}",)


def _triton_cases(part: str, hardware: Hardware) -> Sequence[Case]:
    pair, block, has_dropout = _TRITON[part]
    (dtype, adapter), (whole, some), p = dtypes_of(pair), _RANKS[block], _P * has_dropout
    return (
        Case(128 * hardware.sm_count + 12, 136, 136, whole, dtype, adapter, p),
        Case(45, 151, 603, some, dtype, adapter, p, is_plain=True),
    )


TRITON = Qualification(
    FAMILY,
    tuple(_TRITON),
    _triton_touched,
    _triton_cases,
    quick=("float32 r16", "float16+float32 r16 dropout", "bfloat16 r16", "bfloat16+float32 r16 dropout"),
)

_MASKED = {pair: dtypes_of(pair) for pair in PAIRS if pair != "tf32"}


def _mask_cases(part: str, hardware: Hardware) -> Sequence[Case]:
    dtype, adapter = _MASKED[part]
    # Rows that fall into whole words of the recipe, and rows that do not.
    return Case(264, 72, 512, 16, dtype, adapter, _P), Case(45, 151, 603, 11, dtype, adapter, _P, is_plain=True)


MASKS = Qualification(
    FAMILY, tuple(_MASKED), lambda problem: tuple(_MASKED), _mask_cases, quick=("float32", "float16+float32")
)

_DECODED = ("bfloat16", "bfloat16+float32", "float16", "float16+float32")
_GEMM_RANKS = {"16": (16, 8), "32": (32, 24), "64": (64, 40), "128": (128, 72)}
_CUDA = {
    **{f"decode {pair}": ("decode", pair, "", False) for pair in _DECODED},
    **{
        f"gemm {half} r{block}{' dropout' * has_dropout}": ("gemm", half, block, has_dropout)
        for half in ("bfloat16", "float16")
        for block in _GEMM_RANKS
        for has_dropout in (False, True)
    },
}


def _cuda_cases(part: str, hardware: Hardware) -> Sequence[Case]:
    kernel, pair, block, has_dropout = _CUDA[part]
    dtype, adapter = dtypes_of(pair)
    if kernel == "decode":
        return (
            Case(1, 1031, 1024, 16, dtype, adapter),
            Case(16, 200, 520, 64, dtype, adapter, is_plain=True),
            Case(7, 64, 4104, 130, dtype, adapter),
        )
    (whole, some), p = _GEMM_RANKS[block], _P * has_dropout
    # Of the kernel's tiles (csrc/lora/gemm_sm90_shape.h): wide ones with many steps, and, either way, for two rounds of
    # clusters; narrow ones for two rounds, and with a ghost; less than one tile; in one row, one a multiprocessor.
    wide = {"64": 192, "128": 128}.get(block, 256) if has_dropout else 192 if block == "128" else 256
    cols, sms = 2 * wide - 8, hardware.sm_count
    return (
        Case(60 * sms + 12, cols, 264, whole, dtype, adapter, p),
        Case(120 * sms + 12, cols, 40, whole, dtype, adapter, p),
        Case(120 * sms + 12, 40, cols, whole, dtype, adapter, p),
        Case(64 * sms + 12, 264, 264, some, dtype, adapter, p),
        Case(300, 264, 600, some, dtype, adapter, p),
        Case(45, 152, 600, some, dtype, adapter, p, is_plain=True),
        Case(45, (cols // 2 - 4) * sms // 8 * 8, 136, whole, dtype, adapter, p),
    )


def cuda(kernel_of: Callable[[LoraLinearProblem], str]) -> Qualification:
    """The same for the CUDA backend.

    Args:
        kernel_of: names the kernel that runs a problem.
    """

    def touched(problem: LoraLinearProblem) -> tuple[str, ...]:
        kernel = kernel_of(problem)
        dtypes = dtype_name(problem.dtype, problem.adapter_dtype).replace("tf32", "float32")
        if kernel != "gemm":
            return (f"{kernel} {dtypes}",)
        # Where x needs no gradient, dS comes from the launch that makes it for decode, whose problems check that one.
        block = block_of(problem.r, map(int, _GEMM_RANKS))
        return f"gemm {dtypes} r{block}{' dropout' * problem.has_dropout}", f"decode {dtypes}"

    return Qualification(
        FAMILY, tuple(_CUDA), touched, _cuda_cases, quick=("decode bfloat16", "gemm bfloat16 r16"), alone=True
    )


@dataclass(frozen=True)
class GroupCase:
    """One problem of several members, each with an update of rank ``r``; ``is_plain`` as ``Case`` has it."""

    m: int
    n: tuple[int, ...]
    k: int
    r: tuple[int, ...]
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    p: float = 0.0
    is_plain: bool = False

    def __str__(self) -> str:
        dtypes, sizes = dtype_name(self.dtype, self.adapter_dtype), "+".join(map(str, self.n))
        ranks = "+".join(map(str, self.r))
        return f"{self.m}x({sizes})x{self.k} r{ranks} {dtypes}{f' p{self.p}' * (self.p > 0)}"


def _make_group(case: GroupCase, device: torch.device, seed: int) -> tuple[GroupInputs, tuple[Tensor, ...]]:
    draw, (dtype, adapter), k = Draw(device, seed), (case.dtype, case.adapter_dtype), case.k
    call = GroupInputs(
        x=draw.normal(dtype, case.m, k),
        weights=tuple(draw.normal(dtype, n, k, std=k**-0.5) for n in case.n),
        biases=tuple(None if case.is_plain or j == 1 else draw.normal(dtype, n) for j, n in enumerate(case.n)),
        lora_a=tuple(draw.normal(adapter, r, k, std=k**-0.5) for r in case.r),
        lora_b=tuple(draw.normal(adapter, n, r, std=r**-0.5) for n, r in zip(case.n, case.r, strict=True)),
        scales=tuple(0.75 if case.is_plain else torch.tensor(0.5 + j, device=device) for j in range(len(case.n))),
        members=tuple(range(len(case.n))),
        dropout_p=(case.p,) * len(case.n),
        lanes=tuple(range(len(case.n))),
        seed=dropout.as_seed(_SEED + seed, device) if case.p else None,
    )
    return call, tuple(draw.normal(dtype, case.m, n) for n in case.n)


def _eager_group(call: GroupInputs) -> tuple[Tensor, ...]:
    return tuple(_eager(call.update(j), call.lanes[j]) for j in range(len(call.weights)))


_GROUP_RANKS = {
    "16": ((8, 8), (5, 6)),
    "32": ((16, 16), (11, 16)),
    "64": ((16, 16, 16), (33, 5, 21)),
    "more": ((64, 64), (130, 3, 40)),
}
_GROUPS = {
    f"{pair} r{block}{' dropout' * has_dropout}": (pair, block, has_dropout)
    for pair in PAIRS
    for block in _GROUP_RANKS
    for has_dropout in (False, True)
}


def _group_touched(problem: LoraGroupProblem) -> tuple[str, ...]:
    """A part for each dtype of factors, and for updates with masks and without."""
    block = block_of(sum(problem.r), _BLOCKS)
    kinds = dict.fromkeys(zip(problem.adapter_dtypes, map(bool, problem.thresholds), strict=True))
    return tuple(
        f"{dtype_name(problem.dtype, adapter)} r{block}{' dropout' * has_dropout}" for adapter, has_dropout in kinds
    )


def _group_cases(part: str, hardware: Hardware) -> Sequence[GroupCase]:
    pair, block, has_dropout = _GROUPS[part]
    (dtype, adapter), (whole, some), p = dtypes_of(pair), _GROUP_RANKS[block], _P * has_dropout
    sizes = (136, 72, 264)
    return (
        GroupCase(64 * hardware.sm_count + 12, sizes[: len(whole)], 136, whole, dtype, adapter, p),
        GroupCase(45, (151, 33, 70)[: len(some)], 603, some, dtype, adapter, p, is_plain=True),
    )


GROUP = Qualification(
    Family(GROUP_NAME, _make_group, _eager_group, double),
    tuple(_GROUPS),
    _group_touched,
    _group_cases,
    quick=("bfloat16 r64", "bfloat16 r64 dropout"),
)


@dataclass(frozen=True)
class RowsCase:
    """One problem of rows that choose an adapter.

    Attributes:
        n: out-features of each member, which has one update.
        counts: rows of each slot; the other rows have no adapter.
        ranks: of each slot, in all members alike.
        ps: of each slot.
    """

    m: int
    n: tuple[int, ...]
    k: int
    counts: tuple[int, ...]
    ranks: tuple[int, ...]
    ps: tuple[float, ...]
    dtype: torch.dtype
    adapter_dtype: torch.dtype

    def __str__(self) -> str:
        dtypes, sizes = dtype_name(self.dtype, self.adapter_dtype), "+".join(map(str, self.n))
        ranks = "+".join(map(str, self.ranks))
        return f"{self.m}x({sizes})x{self.k} r{ranks} {dtypes}{f' p{max(self.ps)}' * any(self.ps)}"


def _make_rows(case: RowsCase, device: torch.device, seed: int) -> tuple[RowsInputs, tuple[Tensor, ...]]:
    draw, (dtype, adapter), k = Draw(device, seed), (case.dtype, case.adapter_dtype), case.k
    slots, width, total = len(case.counts), max(case.ranks), sum(case.ranks)
    of_rows = torch.full((case.m,), -1)
    chosen = torch.randperm(case.m, generator=draw.generator)[: sum(case.counts)]
    of_rows[chosen] = torch.arange(slots).repeat_interleave(torch.tensor(case.counts))
    rows = Rows.of(of_rows, known=slots, device=device)
    firsts = [sum(case.ranks[:t]) for t in range(slots)]
    table = torch.tensor([firsts, case.ranks, [dropout.threshold(p) for p in case.ps]], dtype=torch.int32)
    count = len(case.n)
    call = RowsInputs(
        x=draw.normal(dtype, case.m, k),
        weights=tuple(draw.normal(dtype, n, k, std=k**-0.5) for n in case.n),
        biases=tuple(None if j == 1 else draw.normal(dtype, n) for j, n in enumerate(case.n)),
        lora_a=tuple(draw.normal(adapter, total, k, std=k**-0.5) for _ in case.n),
        lora_b=tuple(draw.normal(adapter, n, total, std=width**-0.5) for n in case.n),
        scales=tuple(torch.linspace(0.5, 1.0 + j, slots).to(device) for j in range(count)),
        tables=(table.to(device),) * count,
        host_tables=(table,) * count,
        members=tuple(range(count)),
        lanes=tuple(range(count)),
        widths=(width,) * count,
        slot=rows.slot,
        order=rows.order,
        first=rows.first,
        runs=rows.runs,
        seed=dropout.as_seed(_SEED + seed, device) if any(case.ps) else None,
    )
    return call, tuple(draw.normal(dtype, case.m, n) for n in case.n)


def _eager_rows(call: RowsInputs) -> tuple[Tensor, ...]:
    bases = (F.linear(call.x, weight, bias) for weight, bias in zip(call.weights, call.biases, strict=True))
    return tuple(eager_rows_update(base, call, j) for j, base in enumerate(bases))


def eager_rows_update(result: Tensor, call: RowsInputs, j: int) -> Tensor:
    """PEFT's loop over the adapters of a mixed batch, with the masks of this package, on what member j made."""
    m, k = call.x.shape
    for t, (first, rank, limit) in enumerate(call.host_tables[j].t().tolist()):
        rows = call.order[call.first[t] : call.first[t + 1]].long()
        if rank == 0 or len(rows) == 0:
            continue
        ranks = slice(first, first + rank)
        x = call.x[rows].to(call.lora_a[j].dtype)
        if limit and call.seed is not None:
            keep = dropout.keep_mask(call.seed, m, k, limit, call.lanes[j])[rows]
            x = x * keep.to(x.dtype).mul_(dropout.keep_scale(limit))
        scale = call.scales[j][t].to(x.dtype)
        update = F.linear(F.linear(x, call.lora_a[j][ranks]), call.lora_b[j][:, ranks]) * scale
        result = result.index_add(0, rows, update.to(result.dtype))
    return result


# Of the tall and of the ragged problem: the ranks of those slots that have a full tile, and of the others.
_ROWS_RANKS = {"16": (16, 8, 11, 3), "32": (32, 24, 27, 5), "64": (64, 16, 59, 33), "more": (96, 8, 130, 17)}
_ROWS = {
    f"{pair} r{block}{' dropout' * has_dropout}": (pair, block, has_dropout)
    for pair in PAIRS
    for block in _ROWS_RANKS
    for has_dropout in (False, True)
}


def _rows_touched(problem: LoraRowsProblem) -> tuple[str, ...]:
    """A part for each dtype of factors and each block that ranks fall into."""
    kinds = dict.fromkeys(
        (adapter, block_of(width, _BLOCKS))
        for adapter, width in zip(problem.adapter_dtypes, problem.widths, strict=True)
        if width
    )
    return tuple(
        f"{dtype_name(problem.dtype, adapter)} r{block}{' dropout' * problem.has_dropout}" for adapter, block in kinds
    )


def _rows_cases(part: str, hardware: Hardware) -> Sequence[RowsCase]:
    """Slots of several tiles and of several spans, of one row and of none; ranks of 0; rows without an adapter; in the
    second problem more slots than the shortest vector of them holds.
    """
    pair, block, has_dropout = _ROWS[part]
    dtype, adapter = dtypes_of(pair)
    whole, some, ragged, few = _ROWS_RANKS[block]
    m, p = 64 * hardware.sm_count + 12, _P * has_dropout
    tall = (m // 2, 40, 0, 1, m // 4), (whole, some, some, whole, 0), (p, 0.0, p, p, p)
    many = (33, 0, 17, *[1] * 15), (ragged, few, ragged, *[few, 0, ragged] * 5), (p, p, 3 * p, *[p, p, 0.0] * 5)
    return RowsCase(m, (136, 72), 136, *tall, dtype, adapter), RowsCase(80, (151,), 603, *many, dtype, adapter)


ROWS = Qualification(
    Family(ROWS_NAME, _make_rows, _eager_rows, double),
    tuple(_ROWS),
    _rows_touched,
    _rows_cases,
    quick=("bfloat16 r16", "bfloat16+float32 r32 dropout"),
)

"""The launches of LoRA that are compiled ahead of time: forward, backward; dtypes, ranks, lanes, slots, alignments."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from peft_kernels.lora.gain import problem as gain_problem
from peft_kernels.lora.gain import triton_impl as gain_impl
from peft_kernels.lora.gain_alone import problem as gain_alone_problem
from peft_kernels.lora.gain_alone import triton_impl as gain_alone_impl
from peft_kernels.lora.group import problem as group_problem
from peft_kernels.lora.group import triton_impl as group_impl
from peft_kernels.lora.kernels import masks
from peft_kernels.lora.kernels.dropout import Rows
from peft_kernels.lora.linear import triton_impl
from peft_kernels.lora.linear.problem import Inputs, Needs, make_problem
from peft_kernels.lora.members import Needs as MembersNeeds
from peft_kernels.lora.rows import op as rows_op
from peft_kernels.lora.rows import problem as rows_problem
from peft_kernels.lora.rows import triton_impl as rows_impl

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def launches() -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and action of each case; a name is `dtype/adapter dtype/r/p/K`."""
    for r, p in itertools.product((16, 64, 512), (0.0, 0.1)):
        yield _case(BF16, FP32, r, p, 4096)
    for r, p in itertools.product((16, 64), (0.0, 0.1)):
        yield _case(BF16, BF16, r, p, 4096)
    for dtype, p in itertools.product((FP16, FP32), (0.0, 0.1)):
        yield _case(dtype, FP32, 16, p, 4096)
    yield _case(FP16, FP16, 16, 0.1, 4096)
    yield _case(FP16, FP32, 64, 0.0, 4096)
    for dtype, adapter, k in ((BF16, FP32, 4096), (BF16, BF16, 4096), (FP16, FP16, 4096), (FP32, FP32, 4095)):
        yield _mask_case(dtype, adapter, k)
    # Rows that are no multiple of 16 bytes.
    yield _case(BF16, FP32, 16, 0.1, 4095)
    for dtype, adapter in ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)):
        yield _group_case(dtype, adapter, (16, 16, 16), 0.1)
    for ranks in ((64, 64), (16, 5, 1, 33), (130, 8)):
        yield _group_case(BF16, BF16, ranks, 0.1)
    yield _group_case(BF16, FP32, (64, 8, 16, 64), 0.1)
    yield _group_case(BF16, BF16, (16, 16, 16), 0.0)
    for dtype, adapter, p in ((BF16, FP32, 0.0), (FP16, FP32, 0.1), (FP16, FP16, 0.0), (FP32, FP32, 0.0)):
        yield _rows_case(dtype, adapter, (16,) * 16, p)
    for ranks, adapter, p in (((5, 3), BF16, 0.0), ((5, 3), FP32, 0.1), ((32, 8, 12, 0), FP32, 0.1)):
        yield _rows_case(BF16, adapter, ranks, p)
    for ranks, adapter, p in (((64,) * 16, BF16, 0.0), ((128, 64) * 8, FP32, 0.1)):
        yield _rows_case(BF16, adapter, ranks, p)
    for dtype, adapter, r, gain in (
        (BF16, BF16, 16, FP32),
        (BF16, FP32, 32, FP32),
        (FP16, FP16, 16, FP16),
        (FP16, FP32, 32, FP32),
        (FP32, FP32, 32, FP32),
        (BF16, FP32, 64, FP32),
    ):
        yield _gain_case(dtype, adapter, r, gain)
    for dtype, gain in ((BF16, FP32), (FP16, FP16), (FP32, FP32)):
        yield _name(dtype, gain, 0, 0.0, 4096) + "/gain alone", functools.partial(_launch_gain_alone, dtype, gain)
    # Few rows of each slot.
    for m, slots, p in ((8192, 256, 0.1), (64, 64, 0.0)):
        yield _rows_case(BF16, BF16, (16,) * slots, p, m)
    # Members that share x.
    for dtype, ranks, members in ((BF16, (16,) * 16, 3), (FP32, (16,) * 16, 2), (BF16, (64,) * 8, 4)):
        yield _rows_case(dtype, FP32, ranks, 0.1, members=members)
    yield _rows_case(BF16, BF16, (16,) * 16, 0.1, members=3)
    for dtype, adapter in ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)):
        yield _row_invariant_case(dtype, adapter, 16, 0.1, 4096)
    yield _row_invariant_case(BF16, FP32, 64, 0.0, 4095)
    yield _row_invariant_case(BF16, BF16, 512, 0.0, 4096)
    for dtype, adapter, members in ((BF16, BF16, 3), (BF16, FP32, 1), (FP16, FP32, 1), (FP32, FP32, 1)):
        yield _rows_case(dtype, adapter, (16,) * 16, 0.1, members=members, row_invariant=True)


def _name(dtype: torch.dtype, adapter: torch.dtype, r: int, p: float, k: int) -> str:
    short = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    return f"{short[dtype]}/{short[adapter]}/r{r}/p{p}/K{k}"


def _case(dtype: torch.dtype, adapter: torch.dtype, r: int, p: float, k: int) -> tuple[str, Callable[[], None]]:
    return _name(dtype, adapter, r, p, k), functools.partial(_launch, dtype, adapter, r, p, k)


def _row_invariant_case(
    dtype: torch.dtype, adapter: torch.dtype, r: int, p: float, k: int
) -> tuple[str, Callable[[], None]]:
    """Where a row's bits depend on no other row: base products by a kernel, nothing split for few rows."""
    name = _name(dtype, adapter, r, p, k) + "/row-invariant"
    return name, functools.partial(_launch, dtype, adapter, r, p, k, row_invariant=True)


def _group_case(
    dtype: torch.dtype, adapter: torch.dtype, ranks: tuple[int, ...], p: float
) -> tuple[str, Callable[[], None]]:
    """Members of several ranks on one x; what they do not share with each other are launches as above."""
    name = _name(dtype, adapter, 0, p, 4096).replace("r0", "r" + "+".join(map(str, ranks)))
    return name, functools.partial(_launch_group, dtype, adapter, ranks, p)


def _rows_case(
    dtype: torch.dtype,
    adapter: torch.dtype,
    ranks: tuple[int, ...],
    p: float,
    m: int = 8192,
    members: int = 1,
    row_invariant: bool = False,
) -> tuple[str, Callable[[], None]]:
    """Slots of these ranks on members that share x."""
    name = _name(dtype, adapter, max(ranks), p, 4096)
    name += f"/T{len(ranks)}/M{m}/x{members}{'/odd' * any(rank % 8 for rank in ranks)}"
    name += "/row-invariant" * row_invariant
    return name, functools.partial(_launch_rows, dtype, adapter, ranks, p, m, members, row_invariant)


def _gain_case(dtype: torch.dtype, adapter: torch.dtype, r: int, gain: torch.dtype) -> tuple[str, Callable[[], None]]:
    """Without dropout, which other launches have."""
    return _name(dtype, adapter, r, 0.0, 4096) + "/gain", functools.partial(_launch_gain, dtype, adapter, r, gain)


def _mask_case(dtype: torch.dtype, adapter: torch.dtype, k: int) -> tuple[str, Callable[[], None]]:
    """What the torch backend launches."""
    return _name(dtype, adapter, 0, 0.1, k), functools.partial(_launch_mask, dtype, adapter, k)


def _launch_mask(dtype: torch.dtype, adapter: torch.dtype, k: int) -> None:
    make = functools.partial(torch.empty, device="meta")
    part = Rows(make((), dtype=torch.int64), 0, 8192, k, 6554)
    mask = masks.TritonMask(part)
    mask.drop(make(8192, k, dtype=dtype), adapter, 1.0)
    mask.add_dropped(make(8192, k, dtype=dtype), make(8192, k, dtype=adapter), 1.25)


def _launch(
    dtype: torch.dtype, adapter: torch.dtype, r: int, p: float, k: int, m: int = 8192, row_invariant: bool = False
) -> None:
    n = k
    make = functools.partial(torch.empty, device="meta")
    inputs = Inputs(
        x=make(m, k, dtype=dtype),
        weight=make(n, k, dtype=dtype),
        lora_a=make(r, k, dtype=adapter),
        lora_b=make(n, r, dtype=adapter),
        scale=0.5,
        bias=make(n, dtype=dtype),
        dropout_p=p,
        seed=make((), dtype=torch.int64) if p else None,
    )
    problem = dataclasses.replace(make_problem(inputs), row_invariant=row_invariant)
    _, s = triton_impl.forward(problem, inputs)
    dy = make(m, n, dtype=dtype)
    triton_impl.backward(problem, inputs, s, dy, Needs(x=True, weight=False, lora_a=True, lora_b=True, bias=True))


def _launch_gain(dtype: torch.dtype, adapter: torch.dtype, r: int, gain: torch.dtype) -> None:
    m, n, k = 8192, 4096, 4096
    make = functools.partial(torch.empty, device="meta")
    inputs = gain_problem.Inputs(
        x=make(m, k, dtype=dtype),
        weight=make(n, k, dtype=dtype),
        lora_a=make(r, k, dtype=adapter),
        lora_b=make(n, r, dtype=adapter),
        gain=make(n, dtype=gain),
        scale=0.5,
        bias=make(n, dtype=dtype),
        dropout_p=0.0,
        seed=None,
    )
    problem = gain_problem.make_problem(inputs)
    y, s, product = gain_impl.forward(problem, inputs)
    for bias in (True, False):
        needs = gain_problem.Needs(x=True, weight=False, lora_a=True, lora_b=True, gain=True, bias=bias)
        gain_impl.backward(problem, inputs, s, product, torch.empty_like(y), needs)


def _launch_gain_alone(dtype: torch.dtype, gain: torch.dtype) -> None:
    m, n, k = 8192, 4096, 4096
    make = functools.partial(torch.empty, device="meta")
    tensors = make(m, k, dtype=dtype), make(n, k, dtype=dtype), make(n, dtype=gain), make(n, dtype=dtype)
    inputs = gain_alone_problem.Inputs(*tensors)
    problem = gain_alone_problem.make_problem(inputs)
    y, product = gain_alone_impl.forward(problem, inputs)
    for bias in (True, False):
        needs = gain_alone_problem.Needs(x=True, weight=False, gain=True, bias=bias)
        gain_alone_impl.backward(problem, inputs, product, torch.empty_like(y), needs)


def _launch_group(dtype: torch.dtype, adapter: torch.dtype, ranks: tuple[int, ...], p: float) -> None:
    m = n = k = 4096
    make, count = functools.partial(torch.empty, device="meta"), len(ranks)
    inputs = group_problem.Inputs(
        x=make(m, k, dtype=dtype),
        weights=(make(n, k, dtype=dtype),) * count,
        biases=(None,) * count,
        lora_a=tuple(make(r, k, dtype=adapter) for r in ranks),
        lora_b=tuple(make(n, r, dtype=adapter) for r in ranks),
        scales=(0.5,) * count,
        members=tuple(range(count)),
        dropout_p=(p,) * count,
        lanes=tuple(range(count)),
        seed=make((), dtype=torch.int64) if p else None,
    )
    problem = group_problem.make_problem(inputs)
    *ys, s = group_impl.forward(problem, inputs)
    every, none = (True,) * count, (False,) * count
    needs = MembersNeeds(x=True, weights=none, biases=none, lora_a=every, lora_b=every)
    group_impl.backward(problem, inputs, s, [torch.empty_like(y) for y in ys], needs)


def _launch_rows(
    dtype: torch.dtype,
    adapter: torch.dtype,
    ranks: tuple[int, ...],
    p: float,
    m: int,
    members: int,
    row_invariant: bool,
) -> None:
    n = k = 4096
    make, slots = functools.partial(torch.empty, device="meta"), len(ranks)
    table = rows_op.table_of(ranks, p, torch.device("meta"))
    inputs = rows_problem.Inputs(
        x=make(m, k, dtype=dtype),
        weights=(make(n, k, dtype=dtype),) * members,
        biases=(None,) * members,
        lora_a=(make(sum(ranks), k, dtype=adapter),) * members,
        lora_b=(make(n, sum(ranks), dtype=adapter),) * members,
        scales=(make(slots),) * members,
        tables=(table.device,) * members,
        host_tables=(table.host,) * members,
        members=tuple(range(members)),
        lanes=tuple(range(members)),
        widths=(table.width,) * members,
        slot=make(m, dtype=torch.int32),
        order=make(m, dtype=torch.int32),
        first=make(slots + 1, dtype=torch.int32),
        runs=None,
        seed=make((), dtype=torch.int64) if p else None,
    )
    problem = dataclasses.replace(rows_problem.make_problem(inputs), row_invariant=row_invariant)
    *ys, s = rows_impl.forward(problem, inputs)
    every, none = (True,) * members, (False,) * members
    needs = MembersNeeds(x=True, weights=none, biases=none, lora_a=every, lora_b=every)
    rows_impl.backward(problem, inputs, s, [torch.empty_like(y) for y in ys], needs)


def required_opcodes(kernel: str, launch: str, arch: int) -> tuple[str, ...]:
    """Instructions without which a kernel is not what it was written to be; ``A|B`` is either."""
    if kernel in ("dropout_kernel", "rows_sum_spans_kernel"):
        return ("LDG", "STG")
    if kernel == "gain_narrow_and_reduce_kernel" and ("/r64/" in launch or launch.endswith("/gain alone")):
        # Sums of columns alone, on sm_100 of pairs, which are no FFMA.
        return ("LDG", "STG") if arch >= 100 else ("FFMA", "STG")
    if launch.startswith("fp32"):
        # Without TF32, float32 products have no tensor core.
        return ("FFMA",)
    return ("HMMA|HGMMA|UTCHMMA",)

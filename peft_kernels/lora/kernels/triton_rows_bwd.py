"""LoRA by rows on Triton, gradients of factors: sums over the rows of each slot, in an order that is always the same.

Equation  narrow_and_reduce: dS_part = s_t dY[m] B_t and dB_t = s_t dY^T S over the slot's rows, in one pass over dY
          reduce_rows: out_t = f_t S^T drop_t(x) over the slot's rows; dS for S gives dA, dY for x gives dB^T
          (docs/design/lora.md, "Rows"; f_t, lanes and rows as in triton_rows.py)
Tensors   dY (M, N), x (M, K), B (N, sum of ranks): any strides; S, dS (M, sum of widths) float32, contiguous rows
          dB and out in the adapters' dtype; partial sums float32: dS (tiles of N, M, width), others (spans, N, width)
          or (spans, sum of widths, K)
Tiles     a *span* is a number of consecutive tiles of one slot; a program owns one, and BLOCK_N columns of dY, or
          BLOCK_K of x and BLOCK_R ranks of one lane. The span of a slot that has no other writes its gradient; those of
          a slot of several leave partial sums, which a program for each such slot adds up
Bound     one read of the rows of dY, or x, that have an adapter; beside partial dS at most 2 (M - 1) / rows of a span
          partial sums, whatever T is
Refused   narrow_and_reduce: a width > BLOCK_R (config.py then takes two passes instead); as triton_rows.py otherwise
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_math import dot
from peft_kernels._core.triton_rows import owner, tiles_of_slots
from peft_kernels._core.triton_tools import blocks_of_range, cdiv, dot_precision
from peft_kernels.lora.kernels.config import NarrowAndReduceConfig, ReduceRowsConfig, SumSpansConfig
from peft_kernels.lora.kernels.triton_dropout import columns_of_lane, keep_tile
from peft_kernels.lora.kernels.triton_fwd import partials_for, summed
from peft_kernels.lora.kernels.triton_rows import (
    Lane,
    Plan,
    blocks_of_lanes,
    factor_of_slot,
    lane_flags,
    lane_of_block,
    of_lane,
    pointers_of_lanes,
    ranks_of_slot,
)


@triton.jit
def place_of_partial(slot, span, spans, SLOTS: tl.constexpr):
    """Where a span's partial sum is among those of the slots that have several spans."""
    is_earlier = tl.arange(0, SLOTS) < slot
    return tl.sum(tl.where(is_earlier & (spans > 1), spans, 0), 0) + span


@triton.jit(do_not_specialize=("M", "T", "span_rows"))
def rows_narrow_and_reduce_kernel(
    # pointers
    dy_ptr, order_ptr, first_ptr, s_ptr, b_ptr, table_ptr, scales_ptr, ds_ptr, db_ptr, partials_ptr,
    # free
    M, T, span_rows,
    # specialized
    N, width, stride_ym, stride_yn, stride_sm, stride_bn, stride_br, stride_dsm, stride_dbn, stride_dbr,
    # constexprs
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, MULTIPLE: tl.constexpr, SLOTS: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_n, pid_span = tl.program_id(0), tl.program_id(1)
    spans = tiles_of_slots(first_ptr, T, span_rows, SLOTS)
    slot, span = owner(pid_span, spans)
    if slot >= T:
        return
    first_rank, rank = ranks_of_slot(table_ptr, slot, T, MULTIPLE)
    if rank == 0:
        return
    begin, end = tl.load(first_ptr + slot), tl.load(first_ptr + slot + 1)
    place = place_of_partial(slot, span, spans, SLOTS)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < rank
    mask_b = mask_n[:, None] & mask_r[None, :]
    scale = tl.load(scales_ptr + slot)
    ranks = (first_rank + offs_r).to(tl.int64)
    if NEEDS_DS:
        b_offsets = offs_n.to(tl.int64)[:, None] * stride_bn + ranks[None, :] * stride_br
        b = tl.load(b_ptr + b_offsets, mask=mask_b, other=0.0)

    first = begin + span * span_rows
    last = min(first + span_rows, end)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last
        rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
        dy_offsets = rows.to(tl.int64)[:, None] * stride_ym + offs_n.to(tl.int64)[None, :] * stride_yn
        dy = tl.load(dy_ptr + dy_offsets, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        places = offs_m.to(tl.int64)[:, None]
        mask_s = mask_m[:, None] & mask_r[None, :]
        if NEEDS_DB:
            s = tl.load(s_ptr + places * stride_sm + offs_r[None, :], mask=mask_s, other=0.0)
            db = dot(tl.trans(dy), s, db, EXACT, PRECISION)
        if NEEDS_DS:
            ds = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), EXACT, PRECISION) * scale
            tl.store(ds_ptr + (pid_n.to(tl.int64) * M + places) * stride_dsm + offs_r[None, :], ds, mask=mask_s)

    if NEEDS_DB:
        db = db * scale
        if end - begin > span_rows:
            db_rows = partials_ptr + (place.to(tl.int64) * N + offs_n.to(tl.int64))[:, None] * width
            tl.store(db_rows + offs_r[None, :], db, mask=mask_b)
        else:
            db_offsets = offs_n.to(tl.int64)[:, None] * stride_dbn + ranks[None, :] * stride_dbr
            tl.store(db_ptr + db_offsets, db, mask=mask_b)


@triton.jit(do_not_specialize=("T", "span_rows"))
def rows_reduce_kernel(
    # pointers
    x_ptr, order_ptr, first_ptr, s_ptr, out_0, out_1, out_2, out_3, table_0, table_1, table_2, table_3,
    scales_ptr, seed_ptr, partials_ptr,
    # free
    T, span_rows,
    # specialized
    K, width, stride_xm, stride_xk, stride_sm, stride_or, stride_ok,
    # constexprs
    HAS_SCALES: tl.constexpr, HAS_DROPOUT: tl.constexpr, RANKS: tl.constexpr, NUMBERS: tl.constexpr,
    MULTIPLE: tl.constexpr, SLOTS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid, pid_span = tl.program_id(0), tl.program_id(1)
    pid_k, lane, block = lane_of_block(pid, RANKS, BLOCK_R)
    spans = tiles_of_slots(first_ptr, T, span_rows, SLOTS)
    slot, span = owner(pid_span, spans)
    if slot >= T:
        return
    table_ptr = of_lane(lane, table_0, table_1, table_2, table_3, RANKS)
    first_rank, rank = ranks_of_slot(table_ptr, slot, T, MULTIPLE)
    if block * BLOCK_R >= rank:
        return
    begin, end = tl.load(first_ptr + slot), tl.load(first_ptr + slot + 1)
    place = place_of_partial(slot, span, spans, SLOTS)
    threshold = tl.load(table_ptr + 2 * T + slot)
    column, _, number = columns_of_lane(lane, RANKS, NUMBERS)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < rank

    first = begin + span * span_rows
    last = min(first + span_rows, end)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last
        rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
        x_offsets = rows.to(tl.int64)[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
        x = tl.load(x_ptr + x_offsets, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        s_offsets = offs_m.to(tl.int64)[:, None] * stride_sm + column + offs_r[None, :]
        s = tl.load(s_ptr + s_offsets, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if HAS_DROPOUT:
            keep = keep_tile(tl.load(seed_ptr), number, rows, pid_k * BLOCK_K, threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = dot(tl.trans(s), x, acc, EXACT, PRECISION)

    acc = acc * factor_of_slot(scales_ptr, threshold, slot, HAS_SCALES, HAS_DROPOUT)
    mask = mask_r[:, None] & mask_k[None, :]
    if end - begin > span_rows:
        part_rows = partials_ptr + (place.to(tl.int64) * width + column + offs_r.to(tl.int64))[:, None] * K
        tl.store(part_rows + offs_k[None, :], acc, mask=mask)
    else:
        out_ptr = of_lane(lane, out_0, out_1, out_2, out_3, RANKS)
        out_rows = out_ptr + (first_rank + offs_r).to(tl.int64)[:, None] * stride_or
        tl.store(out_rows + offs_k.to(tl.int64)[None, :] * stride_ok, acc, mask=mask)


@triton.jit(do_not_specialize=("T", "span_rows"))
def rows_sum_spans_kernel(
    # pointers
    partials_ptr, out_ptr, first_ptr, table_ptr,
    # free
    T, span_rows,
    # specialized
    N, stride_pp, stride_pr, stride_pn, stride_or, stride_on,
    # constexprs
    MULTIPLE: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid, pid_n, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    spans = tiles_of_slots(first_ptr, T, span_rows, SLOTS)
    slot, _ = owner(pid, (spans > 1).to(tl.int32))
    if slot >= T:
        return
    first_rank, rank = ranks_of_slot(table_ptr, slot, T, MULTIPLE)
    count = tl.load(first_ptr + slot + 1) - tl.load(first_ptr + slot)
    place = place_of_partial(slot, 0, spans, SLOTS)
    offs_r, offs_n = pid_r * BLOCK_R + tl.arange(0, BLOCK_R), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_r < rank)[:, None] & (offs_n < N)[None, :]
    columns = offs_n.to(tl.int64)[None, :]
    tile = (
        partials_ptr + place.to(tl.int64) * stride_pp + offs_r.to(tl.int64)[:, None] * stride_pr + columns * stride_pn
    )
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for _ in range(0, count, span_rows):
        total += tl.load(tile, mask=mask, other=0.0)
        tile += stride_pp
    out_rows = out_ptr + (first_rank + offs_r).to(tl.int64)[:, None] * stride_or
    tl.store(out_rows + columns * stride_on, total, mask=mask)


_launch_narrow_and_reduce = Launcher(
    rows_narrow_and_reduce_kernel, flags=("NEEDS_DS", "NEEDS_DB", "MULTIPLE", "SLOTS", "EXACT", "PRECISION")
)
_launch_reduce = Launcher(
    rows_reduce_kernel,
    flags=("HAS_SCALES", "HAS_DROPOUT", "RANKS", "NUMBERS", "MULTIPLE", "SLOTS", "EXACT", "PRECISION"),
)
_launch_sum_spans = Launcher(rows_sum_spans_kernel, flags=("MULTIPLE", "SLOTS"))


def narrow_and_reduce(
    dy: Tensor,
    s: Tensor | None,
    lane: Lane,
    plan: Plan,
    scales: Tensor,
    exact: bool,
    config: NarrowAndReduceConfig,
    ds: Tensor | None,
    db: Tensor | None,
) -> None:
    """Launch one pass over dy, which writes dS and dB, those that there are, where a slot has rows and ranks.

    Args:
        dy: (M, N). s: (M, width) float32 with contiguous rows, for dB alone.
        lane: its factor is b (N, sum of ranks).
        scales: (T,) float32.
        exact: keep all bits of the float32 operands beside a half-precision dy.
        ds: (M, width) float32 with contiguous rows. db: (N, sum of ranks), zeros.
    """
    m, n = dy.shape
    tiles_n, rows = cdiv(n, config.BLOCK_N), rows_of_span(m, config)
    ds_partials = None if ds is None else partials_for(ds, tiles_n, m, lane.width, dy.device)
    partials = None if db is None else _partials(m, rows, (n, lane.width), dy.device)

    _launch_narrow_and_reduce(
        (tiles_n, plan.tiles(rows), 1),
        (dy, plan.order, plan.first, s, lane.factor, lane.table, scales, ds_partials, db, partials),
        (m, plan.slots, rows),
        (
            n,
            lane.width,
            *dy.stride(),
            0 if s is None else s.stride(0),
            *lane.factor.stride(),
            0 if ds_partials is None else ds_partials.stride(-2),
            *((0, 0) if db is None else db.stride()),
        ),
        (ds is not None, db is not None, lane.multiple, plan.vector, exact, dot_precision(dy.dtype)),
        config,
    )
    if ds is not None and ds_partials is not None:
        summed(ds_partials, tiles_n, ds)
    if db is not None and partials is not None:
        _sum_spans(partials.transpose(1, 2), lane._replace(factor=db.t()), plan, rows)


def reduce_rows(
    x: Tensor,
    s: Tensor,
    lanes: Sequence[Lane],
    plan: Plan,
    scales: Tensor | None,
    seed: Tensor | None,
    exact: bool,
    config: ReduceRowsConfig,
) -> None:
    """Launch factor * s^T drop(x) over the rows of each slot, into what the lanes have for factors.

    Args:
        x: (M, K). s: (M, sum of widths) float32 with contiguous rows.
        lanes: factors are the results (sum of ranks, K), zeros, all with the same strides.
        scales: (T,) float32, of one lane.
        seed: of the dropout of x; None: nothing is dropped.
        exact: keep all bits of s beside a half-precision x.
    """
    (m, k), width = x.shape, sum(lane.width for lane in lanes)
    rows = rows_of_span(m, config)
    partials = _partials(m, rows, (width, k), x.device)

    _launch_reduce(
        (cdiv(k, config.BLOCK_K) * blocks_of_lanes(lanes, config.BLOCK_R), plan.tiles(rows), 1),
        (x, plan.order, plan.first, s, *pointers_of_lanes(lanes), scales, seed, partials),
        (plan.slots, rows),
        (k, width, *x.stride(), s.stride(0), *lanes[0].factor.stride()),
        (*lane_flags(lanes, plan, scales, seed, config.BLOCK_R), exact, dot_precision(x.dtype)),
        config,
    )
    for lane, columns in zip(lanes, partials.split([lane.width for lane in lanes], dim=1), strict=True):
        _sum_spans(columns, lane, plan, rows)


def rows_of_span(m: int, config: NarrowAndReduceConfig | ReduceRowsConfig) -> int:
    """Rows of a span: those of one of ``splits`` ranges that share out all rows."""
    return blocks_of_range(m, config.BLOCK_M, config.splits) * config.BLOCK_M


def most_slots_of_several(m: int, rows: int) -> int:
    """A bound of how many slots have more than ``rows`` rows; such a slot of c rows has at most 2 ((c - 1) // rows)
    spans.
    """
    return (m - 1) // rows


def _partials(m: int, rows: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Room for the partial sums of slots that have several spans; none where there can be no such slot."""
    return torch.empty(2 * most_slots_of_several(m, rows), *shape, dtype=torch.float32, device=device)


def _sum_spans(partials: Tensor, lane: Lane, plan: Plan, rows: int) -> None:
    """Launch the sums of partials (spans, width, N), if there are any, into the factor (sum of ranks, N) of a lane."""
    if partials.shape[0] == 0:
        return
    config = SumSpansConfig(BLOCK_R=16, BLOCK_N=64, num_warps=4, num_stages=1)
    n = partials.shape[2]
    _launch_sum_spans(
        (most_slots_of_several(plan.order.shape[0], rows), cdiv(n, config.BLOCK_N), cdiv(lane.width, config.BLOCK_R)),
        (partials, lane.factor, plan.first, lane.table),
        (plan.slots, rows),
        (n, *partials.stride(), *lane.factor.stride()),
        (lane.multiple, plan.vector),
        config,
    )

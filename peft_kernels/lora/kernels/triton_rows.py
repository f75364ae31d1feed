"""LoRA by rows on Triton, activations: the products of triton_fwd.py where each row has an adapter of its own, or none.

Equation  narrow_product: S[i] = f_t drop_t(x[m]) A_t^T | add_rank_product: y[m] += f_t drop'_t(S[i] B_t^T), in place
          m = order[i] for i = first[t] ... first[t + 1] - 1; f_t is the slot's scale, 1 / (1 - p_t), their product or 1
          with lanes S = [S_1 | S_2 | ...], each with tables and factors of its own, and drop' of each lane's product
          (docs/design/lora.md, "Rows")
Tensors   x (M, K), y (M, N): rows in any order of slots; order (M,), first (T + 1,) int32; S (M, sum of widths)
          float32, contiguous rows; A (sum of ranks, K), B (N, sum of ranks): any strides; table (3, T) int32
Tiles     a program owns at most BLOCK_M rows of one slot, which it finds from its number and ``first``; of S BLOCK_R
          ranks of one lane and a range of K, of y BLOCK_N columns. Those beyond the last tile return
Bound     narrow_product: one read of the rows of x that have an adapter | add_rank_product: one read and one write of
          those of y
Refused   M, N or K >= 2^31; T > ``MOST_SLOTS``; more than ``MOST_LANES`` lanes, or lanes of several strides; float64
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_math import dot, split_range
from peft_kernels._core.triton_rows import owner, tiles_of_slots
from peft_kernels._core.triton_tools import blocks_of_range, cdiv, dot_precision, next_power_of_2
from peft_kernels.lora.kernels.config import MOST_LANES, NarrowProductConfig, RankProductConfig
from peft_kernels.lora.kernels.triton_dropout import as_int32, columns_of_lane, keep_tile
from peft_kernels.lora.kernels.triton_fwd import partials_for, rank_steps, summed

# Of T slots a vector of the next power of two is loaded, and of few this one: each size is a variant.
_LEAST_SLOTS = 16


class Plan(NamedTuple):
    """Which rows a slot has, as ``Rows`` tells it: those of slot t are order[first[t] : first[t + 1]].

    Attributes:
        order: (M,) int32.
        first: (T + 1,) int32.
    """

    order: Tensor
    first: Tensor

    @property
    def slots(self) -> int:
        return self.first.shape[0] - 1

    @property
    def vector(self) -> int:
        """The length of a vector that holds all slots."""
        return max(_LEAST_SLOTS, next_power_of_2(self.slots))

    def tiles(self, rows: int) -> int:
        """A bound of how many tiles of ``rows`` rows there are, known without the slots: each slot has a last one."""
        m = self.order.shape[0]
        return cdiv(m, rows) + min(self.slots, m)


class Lane(NamedTuple):
    """An update, as kernels by rows take it.

    Attributes:
        factor: what is read of it or written: A, B, a transposed one, or a gradient; its slots' parts at ``table``.
        table: (3, T) int32: first rank, rank and dropout's threshold of each slot.
        width: columns of S, which no rank exceeds.
        number: of the dropout's lane.
        multiple: of all first ranks and ranks.
    """

    factor: Tensor
    table: Tensor
    width: int
    number: int = 0
    multiple: int = 1


@triton.jit
def lane_of_block(pid, RANKS: tl.constexpr, BLOCK_R: tl.constexpr):
    """What a program works on: its tile, its lane, and which of the lane's blocks of ranks.

    ``place_in_lanes`` cannot share it: that compiles a group's kernels otherwise.
    """
    total = 0
    for i in tl.static_range(len(RANKS)):
        total += tl.cdiv(RANKS[i], BLOCK_R)
    block = pid % total
    lane, first, blocks = 0, 0, 0
    for i in tl.static_range(len(RANKS)):
        is_here = block >= blocks
        lane, first = tl.where(is_here, i, lane), tl.where(is_here, blocks, first)
        blocks += tl.cdiv(RANKS[i], BLOCK_R)
    return pid // total, lane, block - first


@triton.jit
def of_lane(index, p_0, p_1, p_2, p_3, RANKS: tl.constexpr):
    """One of the lanes' pointers; there are as many as RANKS."""
    found = p_0
    if len(RANKS) > 1:
        found = tl.where(index == 1, p_1, found)
    if len(RANKS) > 2:
        found = tl.where(index == 2, p_2, found)
    if len(RANKS) > 3:
        found = tl.where(index == 3, p_3, found)
    return found


@triton.jit
def ranks_of_slot(table_ptr, slot, T, MULTIPLE: tl.constexpr):
    """First rank and rank of a slot. Where the host knows a multiple of all of them, loads along ranks are vectors."""
    first, rank = tl.load(table_ptr + slot), tl.load(table_ptr + T + slot)
    return tl.multiple_of(first, MULTIPLE), tl.multiple_of(rank, MULTIPLE)


@triton.jit
def factor_of_slot(scales_ptr, threshold, slot, HAS_SCALES: tl.constexpr, HAS_DROPOUT: tl.constexpr):
    """Its scale, 1 / (1 - p), their product or 1, in float32; of 2^16 draws as many as ``threshold`` drop."""
    factor = 1.0
    if HAS_SCALES:
        factor = tl.load(scales_ptr + slot)
    if HAS_DROPOUT:
        factor *= tl.div_rn(65536.0, 65536.0 - threshold.to(tl.float32))
    return factor


@triton.jit(do_not_specialize=("M", "T", "blocks"))
def rows_narrow_product_kernel(
    # pointers
    x_ptr, order_ptr, first_ptr, s_ptr, a_0, a_1, a_2, a_3, table_0, table_1, table_2, table_3, scales_ptr, seed_ptr,
    # free
    M, T, blocks,
    # specialized
    K, stride_xm, stride_xk, stride_ar, stride_ak, stride_sm,
    # constexprs
    HAS_SCALES: tl.constexpr, HAS_DROPOUT: tl.constexpr, RANKS: tl.constexpr, NUMBERS: tl.constexpr,
    MULTIPLE: tl.constexpr, SLOTS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid, pid_split = tl.program_id(0), tl.program_id(1)
    pid_tile, lane, block = lane_of_block(pid, RANKS, BLOCK_R)
    slot, tile = owner(pid_tile, tiles_of_slots(first_ptr, T, BLOCK_M, SLOTS))
    if slot >= T:
        return
    table_ptr = of_lane(lane, table_0, table_1, table_2, table_3, RANKS)
    first_rank, rank = ranks_of_slot(table_ptr, slot, T, MULTIPLE)
    if block * BLOCK_R >= rank:
        return
    offs_m = tl.load(first_ptr + slot) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < tl.load(first_ptr + slot + 1)
    rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < rank
    threshold = tl.load(table_ptr + 2 * T + slot)
    column, _, number = columns_of_lane(lane, RANKS, NUMBERS)
    a_ptr = of_lane(lane, a_0, a_1, a_2, a_3, RANKS)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + (first_rank + offs_r).to(tl.int64)[None, :] * stride_ar

    first, last = split_range(pid_split, K, blocks, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(first, last, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_rows + offs_k.to(tl.int64)[None, :] * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        a = tl.load(
            a_rows + offs_k.to(tl.int64)[:, None] * stride_ak, mask=mask_k[:, None] & mask_r[None, :], other=0.0
        )
        if HAS_DROPOUT:
            x = tl.where(keep_tile(tl.load(seed_ptr), number, rows, k, threshold, BLOCK_K), x, 0.0)
        acc = dot(x, a, acc, EXACT, PRECISION)

    acc = acc * factor_of_slot(scales_ptr, threshold, slot, HAS_SCALES, HAS_DROPOUT)
    s_rows = s_ptr + (pid_split.to(tl.int64) * M + offs_m.to(tl.int64))[:, None] * stride_sm + column
    tl.store(s_rows + offs_r[None, :], acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=("T",))
def rows_add_rank_product_kernel(
    # pointers
    y_ptr, order_ptr, first_ptr, s_ptr, b_0, b_1, b_2, b_3, table_0, table_1, table_2, table_3, scales_ptr, seed_ptr,
    # free
    T,
    # specialized
    N, stride_ym, stride_sm, stride_bn, stride_br,
    # constexprs
    HAS_SCALES: tl.constexpr, HAS_DROPOUT: tl.constexpr, RANKS: tl.constexpr, NUMBERS: tl.constexpr,
    MULTIPLE: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_tile, pid_n = tl.program_id(0), tl.program_id(1)
    slot, tile = owner(pid_tile, tiles_of_slots(first_ptr, T, BLOCK_M, SLOTS))
    if slot >= T:
        return
    most = tl.load(table_0 + T + slot)
    for i in tl.static_range(1, len(RANKS)):
        most = max(most, tl.load(of_lane(i, table_0, table_1, table_2, table_3, RANKS) + T + slot))
    # Adding zero would turn -0 into 0 on rows whose adapter this layer does not have.
    if most == 0:
        return
    offs_m = tl.load(first_ptr + slot) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < tl.load(first_ptr + slot + 1), offs_n < N
    rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    y = tl.load(y_tile, mask=mask, other=0.0)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A loop that is not unrolled: of several lanes at once registers would hold the tiles.
    for lane in range(len(RANKS)):
        table_ptr = of_lane(lane, table_0, table_1, table_2, table_3, RANKS)
        first_rank, rank = ranks_of_slot(table_ptr, slot, T, MULTIPLE)
        threshold = tl.load(table_ptr + 2 * T + slot)
        column, _, number = columns_of_lane(lane, RANKS, NUMBERS)
        b_ptr = of_lane(lane, b_0, b_1, b_2, b_3, RANKS) + first_rank.to(tl.int64) * stride_br
        part = rank_steps(
            s_ptr + column, b_ptr, factor_of_slot(scales_ptr, threshold, slot, HAS_SCALES, HAS_DROPOUT),
            0, rank, offs_m, offs_n, mask_m, mask_n, stride_sm, stride_bn, stride_br,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        if HAS_DROPOUT:
            keep = keep_tile(tl.load(seed_ptr), number, rows, pid_n * BLOCK_N, threshold, BLOCK_N)
            part = tl.where(keep, part, 0.0)
        product += part
    tl.store(y_tile, product + y.to(tl.float32), mask=mask)


_launch_narrow_product = Launcher(
    rows_narrow_product_kernel,
    flags=("HAS_SCALES", "HAS_DROPOUT", "RANKS", "NUMBERS", "MULTIPLE", "SLOTS", "EXACT", "PRECISION"),
)
_launch_add_rank_product = Launcher(
    rows_add_rank_product_kernel,
    flags=("HAS_SCALES", "HAS_DROPOUT", "RANKS", "NUMBERS", "MULTIPLE", "SLOTS", "PRECISION"),
)


def ranks_of_lanes(lanes: Sequence[Lane], block_r: int) -> tuple[int, ...]:
    """What kernels take as RANKS. One lane's columns begin at 0, so it needs no more than how many blocks it has."""
    if len(lanes) == 1:
        return (cdiv(lanes[0].width, block_r) * block_r,)
    return tuple(lane.width for lane in lanes)


def lane_flags(
    lanes: Sequence[Lane], plan: Plan, scales: Tensor | None, seed: Tensor | None, block_r: int
) -> tuple[Any, ...]:
    """The flags from HAS_SCALES to SLOTS."""
    numbers = tuple(0 if seed is None else as_int32(lane.number) for lane in lanes)
    multiple = min(lane.multiple for lane in lanes)
    return scales is not None, seed is not None, ranks_of_lanes(lanes, block_r), numbers, multiple, plan.vector


def pointers_of_lanes(lanes: Sequence[Lane]) -> tuple[Tensor | None, ...]:
    """Their factors, then their tables; None for lanes that are not there."""
    missing = (None,) * (MOST_LANES - len(lanes))
    return *(lane.factor for lane in lanes), *missing, *(lane.table for lane in lanes), *missing


def blocks_of_lanes(lanes: Sequence[Lane], block_r: int) -> int:
    """How many blocks of ranks they have, the fastest part of a grid's first axis."""
    return sum(cdiv(lane.width, block_r) for lane in lanes)


def narrow_product(
    x: Tensor,
    lanes: Sequence[Lane],
    plan: Plan,
    scales: Tensor | None,
    seed: Tensor | None,
    exact: bool,
    config: NarrowProductConfig,
    out: Tensor,
) -> None:
    """Launch S = factor * drop(x) a^T of each row's slot, into the rows and columns of ``out`` that a slot has.

    Args:
        x: (M, K).
        lanes: factors are a (sum of ranks, K), all with the same strides.
        scales: (T,) float32, of one lane.
        seed: of the dropout of x; None: nothing is dropped.
        exact: keep all bits of a float32 a beside a half-precision x.
        out: (M, sum of widths) float32 with contiguous rows; row i is that of x's row order[i].
    """
    m, k = x.shape
    partials = partials_for(out, config.splits, m, out.shape[1], x.device)
    a = lanes[0].factor

    _launch_narrow_product(
        (plan.tiles(config.BLOCK_M) * blocks_of_lanes(lanes, config.BLOCK_R), config.splits, 1),
        (x, plan.order, plan.first, partials, *pointers_of_lanes(lanes), scales, seed),
        (m, plan.slots, blocks_of_range(k, config.BLOCK_K, config.splits)),
        (k, *x.stride(), *a.stride(), partials.stride(-2)),
        (*lane_flags(lanes, plan, scales, seed, config.BLOCK_R), exact, dot_precision(x.dtype)),
        config,
    )
    summed(partials, config.splits, out)


def add_rank_product(
    y: Tensor,
    s: Tensor,
    lanes: Sequence[Lane],
    plan: Plan,
    scales: Tensor | None,
    seed: Tensor | None,
    config: RankProductConfig,
) -> None:
    """Launch y += factor * drop'(s b^T) of each row's slot, in place; rows without one are neither read nor written.

    Args:
        y: (M, N) with contiguous rows.
        s: (M, sum of widths) float32 with contiguous rows, as ``narrow_product`` leaves it.
        lanes: factors are b (N, sum of ranks), all with the same strides.
        scales: (T,) float32, of one lane.
        seed: of the dropout of the (M, N) product; None: nothing is dropped.
    """
    n = y.shape[1]
    precision = dot_precision(y.dtype) if y.dtype == torch.float32 else "tf32"

    _launch_add_rank_product(
        (plan.tiles(config.BLOCK_M), cdiv(n, config.BLOCK_N), 1),
        (y, plan.order, plan.first, s, *pointers_of_lanes(lanes), scales, seed),
        (plan.slots,),
        (n, y.stride(0), s.stride(0), *lanes[0].factor.stride()),
        (*lane_flags(lanes, plan, scales, seed, config.BLOCK_R), precision),
        config,
    )

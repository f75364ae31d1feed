"""Bottleneck adapters by row on Triton: both passes, each product of them on the rows of one slot at a time.

Equation  z = x Wd_t^T + bd_t;  y = residual + s_t (act(z) Wu_t^T + bu_t), t the row's slot; gradients as triton_bwd.py
Tensors   x (M, K), residual and dy (M, N): any strides, rows gathered through ``order``; Wd (R, K), Wu (N, R) of all
          slots; bu (T, N); z, dz (M, width) float32, rows in the plan's order; table (2, T), first ranks and ranks
Tiles     bottleneck_by_slot, bottleneck_grad_by_slot: a program owns at most BLOCK_M rows of one slot
          reduce_by_slot: a program owns BLOCK_C columns, BLOCK_R ranks of one slot, one of the ranges of its rows
          copy_others: a program owns BLOCK_M rows, of which it writes those without an adapter
Bound     as triton_fwd.py and triton_bwd.py, with 4 bytes a row for ``order``
Refused   as triton_fwd.py; a rank > BLOCK_R
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_math import dot
from peft_kernels._core.triton_rows import tile_of_plan
from peft_kernels._core.triton_tools import cdiv, next_power_of_2, shape_of_partials, sum_partials
from peft_kernels.adapter.kernels.config import BottleneckConfig, CopyConfig, ReduceRowsConfig
from peft_kernels.adapter.kernels.triton_activations import activate, activation_grad
from peft_kernels.adapter.kernels.triton_products import into_bottleneck, write_rows

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# slot, order, first; table; scales.
Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def ranks_of(table_ptr, slot, T):
    """First rank, 64 bits, and rank of a slot."""
    return tl.load(table_ptr + slot).to(tl.int64), tl.load(table_ptr + T + slot)


@triton.jit(do_not_specialize=("T", "M"))
def bottleneck_by_slot_kernel(
    # pointers
    x_ptr, wd_ptr, bd_ptr, wu_ptr, bu_ptr, residual_ptr, z_ptr, y_ptr, order_ptr, first_ptr, table_ptr, scales_ptr,
    # free
    T, M,
    # specialized
    N, K, WIDTH, stride_xm, stride_xk, stride_wdr, stride_wdk, stride_wun, stride_wur, stride_rm, stride_rn,
    # constexprs
    ACTIVATION: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, OUT_PRECISION: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    slot, start, end = tile_of_plan(first_ptr, tl.program_id(0), T, BLOCK_M, SLOTS)
    if slot < T:
        first, rank = ranks_of(table_ptr, slot, T)
        if rank > 0:
            places, offs_r = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
            # Beyond the tile: a row that no mask lets through.
            rows = tl.load(order_ptr + places, mask=places < end, other=M)
            z = into_bottleneck(
                x_ptr, wd_ptr + first * stride_wdr, rows, offs_r, 0, K, M, K, rank,
                stride_xm, stride_xk, stride_wdr, stride_wdk, EXACT, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
            )  # fmt: skip
            if HAS_DOWN_BIAS:
                z += tl.load(bd_ptr + first + offs_r, mask=offs_r < rank, other=0.0).to(tl.float32)[None, :]
            z_tile = z_ptr + places.to(tl.int64)[:, None] * WIDTH + offs_r[None, :]
            tl.store(z_tile, z, mask=(places < end)[:, None] & (offs_r < rank)[None, :])
            if HAS_UP_BIAS:
                bu_ptr += slot.to(tl.int64) * N
            write_rows(
                activate(z, ACTIVATION), wu_ptr + first * stride_wur, bu_ptr, residual_ptr, y_ptr,
                tl.load(scales_ptr + slot), rows, offs_r, M, N, rank, stride_wur, stride_wun, stride_rm, stride_rn,
                HAS_UP_BIAS, HAS_RESIDUAL, OUT_PRECISION, BLOCK_M, BLOCK_O,
            )  # fmt: skip


@triton.jit(do_not_specialize=("T", "M"))
def bottleneck_grad_by_slot_kernel(
    # pointers
    dy_ptr, wu_ptr, wd_ptr, z_ptr, dz_ptr, dx_ptr, order_ptr, first_ptr, table_ptr, scales_ptr,
    # free
    T, M,
    # specialized
    N, K, WIDTH, stride_ym, stride_yn, stride_wun, stride_wur, stride_wdr, stride_wdk,
    # constexprs
    ACTIVATION: tl.constexpr, SERIAL: tl.constexpr, NEEDS_DX: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, OUT_PRECISION: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    slot, start, end = tile_of_plan(first_ptr, tl.program_id(0), T, BLOCK_M, SLOTS)
    if slot < T:
        first, rank = ranks_of(table_ptr, slot, T)
        if rank > 0:
            places, offs_r = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
            rows = tl.load(order_ptr + places, mask=places < end, other=M)
            mask_z = (places < end)[:, None] & (offs_r < rank)[None, :]
            z_offsets = places.to(tl.int64)[:, None] * WIDTH + offs_r[None, :]
            dz = into_bottleneck(
                dy_ptr, wu_ptr + first * stride_wur, rows, offs_r, 0, N, M, N, rank,
                stride_ym, stride_yn, stride_wur, stride_wun, EXACT, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
            )  # fmt: skip
            dz = dz * tl.load(scales_ptr + slot)
            dz = dz * activation_grad(tl.load(z_ptr + z_offsets, mask=mask_z, other=0.0), ACTIVATION)
            tl.store(dz_ptr + z_offsets, dz, mask=mask_z)
            if NEEDS_DX:
                write_rows(
                    dz, wd_ptr + first * stride_wdr, None, dy_ptr, dx_ptr, 1.0, rows, offs_r, M, K, rank,
                    stride_wdr, stride_wdk, stride_ym, stride_yn, False, SERIAL, OUT_PRECISION, BLOCK_M, BLOCK_O,
                )  # fmt: skip


@triton.jit(do_not_specialize=("T", "M", "splits"))
def reduce_by_slot_kernel(
    # pointers
    t_ptr, u_ptr, out_ptr, sums_ptr, u_sums_ptr, order_ptr, first_ptr, table_ptr, scales_ptr,
    # free
    T, M, splits,
    # specialized
    C, R, WIDTH, stride_tm, stride_tc, stride_or, stride_oc,
    # constexprs
    ACTIVATION: tl.constexpr, NEEDS_PRODUCT: tl.constexpr, NEEDS_SUMS: tl.constexpr, NEEDS_U_SUMS: tl.constexpr,
    HAS_SCALES: tl.constexpr, OPERAND: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_c, pid_r = tl.program_id(0), tl.program_id(1)
    slot, split = tl.program_id(2) // splits, (tl.program_id(2) % splits).to(tl.int64)
    begin, end = tl.load(first_ptr + slot), tl.load(first_ptr + slot + 1)
    span = tl.cdiv(tl.cdiv(end - begin, BLOCK_M), splits) * BLOCK_M
    first_place = begin + split.to(tl.int32) * span
    last_place = tl.minimum(first_place + span, end)
    first, rank = ranks_of(table_ptr, slot, T)
    if rank == 0:
        last_place = first_place
    offs_c, offs_r = pid_c * BLOCK_C + tl.arange(0, BLOCK_C), pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < rank

    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    u_sums = tl.zeros((BLOCK_R,), tl.float32)
    for place in range(first_place, last_place, BLOCK_M):
        places = place + tl.arange(0, BLOCK_M)
        mask_m = places < last_place
        if NEEDS_PRODUCT or NEEDS_SUMS:
            rows = tl.load(order_ptr + places, mask=mask_m, other=0).to(tl.int64)[:, None]
            t_tile = t_ptr + rows * stride_tm + offs_c.to(tl.int64)[None, :] * stride_tc
            t = tl.load(t_tile, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        if NEEDS_PRODUCT or NEEDS_U_SUMS:
            u_tile = u_ptr + places.to(tl.int64)[:, None] * WIDTH + offs_r[None, :]
            u = tl.load(u_tile, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if NEEDS_PRODUCT:
            acc = dot(tl.trans(activate(u, ACTIVATION).to(OPERAND)), t, acc, EXACT, PRECISION)
        if NEEDS_SUMS:
            sums += tl.sum(t.to(tl.float32), axis=0)
        if NEEDS_U_SUMS:
            u_sums += tl.sum(u, axis=0)

    scale = 1.0
    if HAS_SCALES:
        scale = tl.load(scales_ptr + slot)
    if NEEDS_PRODUCT:
        out_rows = out_ptr + split * C * R + (first + offs_r)[:, None] * stride_or
        out_tile = out_rows + offs_c.to(tl.int64)[None, :] * stride_oc
        tl.store(out_tile, acc * scale, mask=mask_r[:, None] & mask_c[None, :])
    if NEEDS_SUMS:
        sums_tile = sums_ptr + (split * T + slot) * C + offs_c
        tl.store(sums_tile, sums * scale, mask=mask_c & (pid_r == 0))
    if NEEDS_U_SUMS:
        tl.store(u_sums_ptr + split * R + first + offs_r, u_sums, mask=mask_r & (pid_c == 0))


@triton.jit(do_not_specialize=("T", "M"))
def copy_others_kernel(
    # pointers
    source_ptr, out_ptr, slot_ptr, table_ptr,
    # free
    T, M,
    # specialized
    C, stride_sm, stride_sc,
    # constexprs
    HAS_SOURCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(slot_ptr + rows, mask=rows < M, other=-1)
    is_slot = (slot >= 0) & (slot < T)
    rank = tl.load(table_ptr + T + slot, mask=is_slot, other=0)
    is_other = (rows < M) & (rank == 0)
    if tl.max(is_other.to(tl.int32), axis=0) == 1:
        for c in range(0, C, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            mask = is_other[:, None] & (offs_c < C)[None, :]
            value = tl.zeros((BLOCK_M, BLOCK_C), out_ptr.dtype.element_ty)
            if HAS_SOURCE:
                tile = source_ptr + rows.to(tl.int64)[:, None] * stride_sm + offs_c.to(tl.int64)[None, :] * stride_sc
                value = tl.load(tile, mask=mask, other=0.0)
            tl.store(out_ptr + rows.to(tl.int64)[:, None] * C + offs_c[None, :], value, mask=mask)


_launch_bottleneck = Launcher(
    bottleneck_by_slot_kernel,
    ("ACTIVATION", "HAS_DOWN_BIAS", "HAS_UP_BIAS", "HAS_RESIDUAL", "EXACT", "PRECISION", "OUT_PRECISION", "SLOTS"),
)
_launch_bottleneck_grad = Launcher(
    bottleneck_grad_by_slot_kernel,
    ("ACTIVATION", "SERIAL", "NEEDS_DX", "EXACT", "PRECISION", "OUT_PRECISION", "SLOTS"),
)
_launch_reduce = Launcher(
    reduce_by_slot_kernel,
    (
        "ACTIVATION", "NEEDS_PRODUCT", "NEEDS_SUMS", "NEEDS_U_SUMS", "HAS_SCALES", "OPERAND", "EXACT", "PRECISION",
    ),
)  # fmt: skip
_launch_copy = Launcher(copy_others_kernel, ("HAS_SOURCE",))


def bottleneck_by_slot(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    plan: Plan,
    width: int,
    activation: str,
    out_dtype: torch.dtype,
    precisions: tuple[bool, str, str],
    config: BottleneckConfig,
) -> tuple[Tensor, Tensor]:
    """Launch both products and return y (M, N), of which rows without an adapter are not written, and z (M, width).

    Args:
        x: (M, K). weights: Wd (R, K) and Wu (N, R). biases: bd (R,) and bu (T, N), contiguous, or None each.
        residual: (M, N), may be x itself, or None. precisions: as in ``triton_fwd.bottleneck``.
    """
    (wd, wu), (bd, bu), (_, order, first, table, scales) = weights, biases, plan
    (m, k), n, slots = x.shape, wu.shape[0], table.shape[1]
    z = torch.empty(m, width, dtype=torch.float32, device=x.device)
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    strides = (0, 0) if residual is None else residual.stride()

    _launch_bottleneck(
        (_most_tiles(m, slots, config.BLOCK_M), 1, 1),
        (x, wd, bd, wu, bu, residual, z, y, order, first, table, scales),
        (slots, m),
        (n, k, width, *x.stride(), *wd.stride(), *wu.stride(), *strides),
        (activation, bd is not None, bu is not None, residual is not None, *precisions, next_power_of_2(slots)),
        config,
    )
    return y, z


def bottleneck_grad_by_slot(
    dy: Tensor,
    weights: tuple[Tensor | None, Tensor],
    z: Tensor,
    plan: Plan,
    activation: str,
    serial: bool,
    dx_dtype: torch.dtype,
    precisions: tuple[bool, str, str],
    config: BottleneckConfig,
) -> tuple[Tensor | None, Tensor]:
    """Launch both products of the backward pass and return dx (M, K), or None, and dz (M, width) float32.

    Args:
        dy: (M, N). weights: Wd (R, K), None where dx is not needed, and Wu (N, R). z: as it was returned.
        serial: whether dx has dy in it. Rows of dx without an adapter are not written.
    """
    (wd, wu), (_, order, first, table, scales) = weights, plan
    (m, n), slots = dy.shape, table.shape[1]
    dz = torch.empty_like(z)
    k = 0 if wd is None else wd.shape[1]
    dx = None if wd is None else torch.empty(m, k, dtype=dx_dtype, device=dy.device)
    strides = (0, 0) if wd is None else wd.stride()

    _launch_bottleneck_grad(
        (_most_tiles(m, slots, config.BLOCK_M), 1, 1),
        (dy, wu, wd, z, dz, dx, order, first, table, scales),
        (slots, m),
        (n, k, z.shape[1], *dy.stride(), *wu.stride(), *strides),
        (activation, serial, wd is not None, *precisions, next_power_of_2(slots)),
        config,
    )
    return dx, dz


def reduce_by_slot(
    t: Tensor | None,
    u: Tensor | None,
    plan: Plan,
    shape: tuple[int, int, int],
    activation: str,
    is_up: bool,
    needs: tuple[bool, bool],
    operand: torch.dtype,
    precisions: tuple[bool, str, str],
    config: ReduceRowsConfig,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the gradients of one projection and return its weight's and its bias', float32, as ``needs`` asks.

    Args:
        t: (M, C): dy for the up projection, x for the down projection; needed but for the down bias alone.
        u: (M, width) float32: z for the up weight, dz for the down weight and bias.
        shape: M, C and R. is_up: dWu (C, R) = s act(u)^T t and dbu (T, C) = s sum t; else dWd (R, C), dbd (R,) = sum u.
        operand: dtype that act(u) is rounded to for the product: the weight's.
    """
    (m, c, r), (needs_product, needs_sums), (_, order, first, table, scales) = shape, needs, plan
    slots, device, (exact, precision, _) = table.shape[1], order.device, precisions
    out, strides = ((c, r), (1, r)) if is_up else ((r, c), (c, 1))

    def empty(need: bool, *size: int) -> Tensor | None:
        return (
            torch.empty(shape_of_partials(config.splits, *size), dtype=torch.float32, device=device) if need else None
        )

    partials = empty(needs_product, *out)
    sums, u_sums = empty(needs_sums and is_up, slots, c), empty(needs_sums and not is_up, r)
    columns = cdiv(c, config.BLOCK_C) if needs_product or is_up else 1
    width = 0 if u is None else u.shape[1]
    _launch_reduce(
        (columns, cdiv(width, config.BLOCK_R) if needs_product or not is_up else 1, slots * config.splits),
        (t, u, partials, sums, u_sums, order, first, table, scales),
        (slots, m, config.splits),
        (c, r, width, *((0, 0) if t is None else t.stride()), *strides),
        (
            activation, needs_product, sums is not None, u_sums is not None,
            is_up, _OPERANDS[operand], exact, precision,
        ),
        config,
    )  # fmt: skip
    bias = sums if is_up else u_sums
    product, total = (None if parts is None else sum_partials(parts, config.splits) for parts in (partials, bias))
    return product, total


def copy_others(source: Tensor | None, out: Tensor, plan: Plan, config: CopyConfig) -> None:
    """Write the rows of out (M, C) that have no adapter: the source's, of out's dtype, or zeros."""
    (slot, _, _, table, _), (m, c) = plan, out.shape
    strides = (0, 0) if source is None else source.stride()
    _launch_copy(
        (cdiv(m, config.BLOCK_M), 1, 1),
        (source, out, slot, table),
        (table.shape[1], m),
        (c, *strides),
        (source is not None,),
        config,
    )


def _most_tiles(m: int, slots: int, block: int) -> int:
    return cdiv(m, block) + min(slots, m)

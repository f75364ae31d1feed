"""LoRA linear on Triton: the products that make a gradient of a factor, reduced over the tokens.

Equation  narrow_and_reduce: dS_part = f dY B and dB_part = f dY^T S in one pass over dY, and dbias_part = sum dY
          reduce_rows: out_part = f S^T drop(x); dS for S gives dA, dY for x gives dB^T  (docs/design/lora.md)
          with lanes S is [S_1 | S_2 | ...], and out_l = f S_l^T drop_l(x), under each other
Tensors   dY (M, N), x (M, K), B (N, r): any strides; S, dS (M, r) float32, contiguous rows
          partial sums float32: dS (tiles of N, M, r), dB (splits, N, r), dbias (splits, N), out (splits, r, K)
Tiles     narrow_and_reduce: a program owns BLOCK_N columns of dY and one of the ranges of rows
          reduce_rows: likewise of x, and BLOCK_R ranks of one lane; lanes' blocks are the fastest, as there
          partials are then summed in a fixed order, so two runs give the same bits
Bound     narrow_and_reduce: one read of dY; its partials move 2 * 4 r (M N / BLOCK_N + splits N) bytes more, mostly
          within L2
          reduce_rows: one read of x
Refused   narrow_and_reduce: r > BLOCK_R (config.py then takes two passes instead); as triton_fwd.py otherwise
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_math import dot, load_scalar, split_range
from peft_kernels._core.triton_tools import blocks_of_range, cdiv, dot_precision, shape_of_partials, sum_partials
from peft_kernels.lora.kernels.config import NarrowAndReduceConfig, ReduceRowsConfig
from peft_kernels.lora.kernels.dropout import Dropout, Lanes
from peft_kernels.lora.kernels.triton_dropout import grid_of, keep_tile, lane_constants, place_in_lanes
from peft_kernels.lora.kernels.triton_fwd import partials_for, summed


@triton.jit(do_not_specialize=("blocks",))
def narrow_and_reduce_kernel(
    # pointers
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, dbias_ptr, factor,
    # free
    blocks,
    # specialized
    M, N, R, stride_ym, stride_yn, stride_sm, stride_bn, stride_br, stride_dsm,
    # constexprs
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, NEEDS_DBIAS: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_n, pid_split = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    scale = load_scalar(factor, FACTOR_IS_TENSOR)
    if NEEDS_DS:
        b_offsets = offs_n.to(tl.int64)[:, None] * stride_bn + offs_r.to(tl.int64)[None, :] * stride_br
        b = tl.load(b_ptr + b_offsets, mask=mask_n[:, None] & mask_r[None, :], other=0.0)

    first, last = split_range(pid_split, M, blocks, BLOCK_M)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m.to(tl.int64)[:, None]
        dy_offsets = rows * stride_ym + offs_n.to(tl.int64)[None, :] * stride_yn
        dy = tl.load(dy_ptr + dy_offsets, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        mask_s = mask_m[:, None] & mask_r[None, :]
        if NEEDS_DB:
            s = tl.load(s_ptr + rows * stride_sm + offs_r[None, :], mask=mask_s, other=0.0)
            db = dot(tl.trans(dy), s, db, EXACT, PRECISION)
        if NEEDS_DS:
            ds = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), EXACT, PRECISION) * scale
            tl.store(ds_ptr + (pid_n.to(tl.int64) * M + rows) * stride_dsm + offs_r[None, :], ds, mask=mask_s)
        if NEEDS_DBIAS:
            dbias += tl.sum(dy.to(tl.float32), axis=0)

    if NEEDS_DB:
        db_rows = db_ptr + (pid_split.to(tl.int64) * N + offs_n.to(tl.int64))[:, None] * R
        tl.store(db_rows + offs_r[None, :], db * scale, mask=mask_n[:, None] & mask_r[None, :])
    if NEEDS_DBIAS:
        tl.store(dbias_ptr + pid_split.to(tl.int64) * N + offs_n, dbias, mask=mask_n)


@triton.jit(do_not_specialize=("blocks", "dropout_threshold"))
def reduce_rows_kernel(
    # pointers
    x_ptr, s_ptr, out_ptr, seed_ptr, factor,
    # free
    blocks, dropout_threshold,
    # specialized
    M, K, R, stride_xm, stride_xk, stride_sm,
    # constexprs
    HAS_DROPOUT: tl.constexpr, RANKS: tl.constexpr, NUMBERS: tl.constexpr,
    FACTOR_IS_TENSOR: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_r, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if len(RANKS) > 0:
        pid_k, first_r, end_r, lane = place_in_lanes(pid_k, RANKS, NUMBERS, BLOCK_R)
        offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    else:
        # In this order: another one schedules a single layer's loads otherwise.
        offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
        first_r, end_r, lane = pid_r * BLOCK_R, R, NUMBERS[0]
    offs_r = first_r + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < end_r

    first, last = split_range(pid_split, M, blocks, BLOCK_M)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m.to(tl.int64)[:, None]
        x_offsets = rows * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
        x = tl.load(x_ptr + x_offsets, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        s = tl.load(s_ptr + rows * stride_sm + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if HAS_DROPOUT:
            keep = keep_tile(tl.load(seed_ptr), lane, offs_m, pid_k * BLOCK_K, dropout_threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = dot(tl.trans(s), x, acc, EXACT, PRECISION)

    acc = acc * load_scalar(factor, FACTOR_IS_TENSOR)
    out_rows = out_ptr + (pid_split.to(tl.int64) * R + offs_r.to(tl.int64))[:, None] * K
    tl.store(out_rows + offs_k[None, :], acc, mask=mask_r[:, None] & mask_k[None, :])


_launch_narrow_and_reduce = Launcher(
    narrow_and_reduce_kernel,
    flags=("NEEDS_DS", "NEEDS_DB", "NEEDS_DBIAS", "FACTOR_IS_TENSOR", "EXACT", "PRECISION"),
)
_launch_reduce_rows = Launcher(
    reduce_rows_kernel, flags=("HAS_DROPOUT", "RANKS", "NUMBERS", "FACTOR_IS_TENSOR", "EXACT", "PRECISION")
)


def narrow_and_reduce(
    dy: Tensor,
    s: Tensor | None,
    b: Tensor | None,
    factor: float | Tensor,
    needs: tuple[bool, bool, bool],
    r: int,
    exact: bool,
    config: NarrowAndReduceConfig,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch one pass over dy; return dS (M, r), dB (N, r) and dbias (N,), float32, those that ``needs`` asks for.

    Args:
        dy: (M, N). s: (M, r) float32 with contiguous rows, for dB alone. b: (N, r), for dS alone. factor: float or 0-d
            tensor.
        needs: of dS, dB and dbias.
        exact: keep all bits of the float32 operands beside a half-precision dy.
        out: dS, where it is a part of a wider matrix's columns.
    """
    m, n = dy.shape
    needs_ds, needs_db, needs_dbias = needs
    tiles_n = cdiv(n, config.BLOCK_N)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=dy.device)
    ds = partials_for(out, tiles_n, m, r, dy.device) if needs_ds else None
    db = empty(shape_of_partials(config.splits, n, r)) if needs_db else None
    dbias = empty(shape_of_partials(config.splits, n)) if needs_dbias else None

    _launch_narrow_and_reduce(
        (tiles_n, config.splits, 1),
        (dy, s, b, ds, db, dbias, factor),
        (blocks_of_range(m, config.BLOCK_M, config.splits),),
        (
            m,
            n,
            r,
            *dy.stride(),
            0 if s is None else s.stride(0),
            *((0, 0) if b is None else b.stride()),
            0 if ds is None else ds.stride(-2),
        ),
        (*needs, isinstance(factor, Tensor), exact, dot_precision(dy.dtype)),
        config,
    )
    return (
        None if ds is None else summed(ds, tiles_n, out),
        None if db is None else sum_partials(db, config.splits),
        None if dbias is None else sum_partials(dbias, config.splits),
    )


def reduce_rows(
    x: Tensor,
    s: Tensor,
    factor: float | Tensor,
    dropout: Dropout,
    exact: bool,
    config: ReduceRowsConfig,
    lanes: Lanes | None = None,
) -> Tensor:
    """Launch factor * s^T drop(x) and return it (r, K) float32.

    Args:
        x: (M, K). s: (M, r) float32 with contiguous rows. factor: float or 0-d tensor; holds the dropout's keep_scale.
        dropout: of x, or ``NO_DROPOUT``.
        exact: keep all bits of s beside a half-precision x.
        lanes: of the dropout, where the columns of s have several; it has no lane of its own then.
    """
    (m, k), r = x.shape, s.shape[1]
    partials = torch.empty(shape_of_partials(config.splits, r, k), dtype=torch.float32, device=x.device)
    ranks, numbers = lane_constants(dropout, lanes)

    _launch_reduce_rows(
        grid_of(cdiv(k, config.BLOCK_K), r, ranks, config.BLOCK_R, config.splits),
        (x, s, partials, dropout.seed, factor),
        (blocks_of_range(m, config.BLOCK_M, config.splits), dropout.threshold),
        (m, k, r, *x.stride(), s.stride(0)),
        (dropout.seed is not None, ranks, numbers, isinstance(factor, Tensor), exact, dot_precision(x.dtype)),
        config,
    )
    return sum_partials(partials, config.splits)

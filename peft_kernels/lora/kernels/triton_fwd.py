"""LoRA linear on Triton: the products with one narrow factor that make an activation; backward, with other operands.

Equation  narrow_product: S = f drop(x) A^T | rank_product: out = bias + f drop'(S B^T)
          add_rank_product: y += f drop'(S B^T), in place
          with lanes S and A are [S_1 | S_2 | ...] and A_1, A_2, ... under each other, S_l = f drop_l(x) A_l^T, and the
          rank product f sum over l of drop'_l(S_l B_l^T), rounded once
          (Hu et al. 2021, section 4.1; f is the scale or 1 / (1 - p), drop' masks the product instead of x)
Tensors   x (M, K), A (r, K), B (N, r), bias (N,): any strides; out, y (M, N); S (M, r) float32, contiguous rows
          backward: dS is a narrow product of dY with B^T for A; dX's update a rank product of dS for S, A^T for B
Tiles     narrow_product: a program owns BLOCK_M rows, BLOCK_R ranks of one lane and one of the ranges of K; the lanes'
          blocks are the fastest of the grid, so that all but the first find their rows of x in L2
          rank_product: a program owns a (BLOCK_M, BLOCK_N) tile
Bound     narrow_product: one read of x, and one of L2 for each further block of ranks
          rank_product: one write of out | add_rank_product: one read and one write of y
Refused   M, N or K >= 2^31 (offsets are 64-bit, indices are not); float64
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_math import dot, load_scalar, nearest_tf32, split_range
from peft_kernels._core.triton_tools import blocks_of_range, cdiv, dot_precision, shape_of_partials, sum_partials
from peft_kernels.lora.kernels.config import NarrowProductConfig, RankProductConfig
from peft_kernels.lora.kernels.dropout import Dropout, Lanes
from peft_kernels.lora.kernels.triton_dropout import (
    columns_of_lane,
    grid_of,
    keep_tile,
    lane_constants,
    place_in_lanes,
)


class RankProduct(NamedTuple):
    """The product factor * s b^T.

    Attributes:
        s: (M, r) float32, contiguous rows.
        b: (N, r), any strides.
        factor: float or 0-d tensor.
    """

    s: Tensor
    b: Tensor
    factor: float | Tensor


@triton.jit(do_not_specialize=("blocks", "dropout_threshold"))
def narrow_product_kernel(
    # pointers
    x_ptr, a_ptr, s_ptr, seed_ptr, factor,
    # free
    blocks, dropout_threshold,
    # specialized
    M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, stride_sm,
    # constexprs
    HAS_DROPOUT: tl.constexpr, RANKS: tl.constexpr, NUMBERS: tl.constexpr,
    FACTOR_IS_TENSOR: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if len(RANKS) > 0:
        pid_m, first_r, end_r, lane = place_in_lanes(pid_m, RANKS, NUMBERS, BLOCK_R)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    else:
        # In this order: another one schedules a single layer's loads otherwise.
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        first_r, end_r, lane = pid_r * BLOCK_R, R, NUMBERS[0]
    offs_r = first_r + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < end_r
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    a_rows = a_ptr + offs_r.to(tl.int64)[None, :] * stride_ar

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
            x = tl.where(keep_tile(tl.load(seed_ptr), lane, offs_m, k, dropout_threshold, BLOCK_K), x, 0.0)
        acc = dot(x, a, acc, EXACT, PRECISION)

    acc = acc * load_scalar(factor, FACTOR_IS_TENSOR)
    s_rows = s_ptr + (pid_split.to(tl.int64) * M + offs_m.to(tl.int64))[:, None] * stride_sm
    tl.store(s_rows + offs_r[None, :], acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def rank_steps(
    s_ptr, b_ptr, scale, first, end, offs_m, offs_n, mask_m, mask_n, stride_sm, stride_bn, stride_br,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of scale * S B^T over the ranks first ... end - 1.

    The product is TF32 beside half-precision results: S keeps float32's range and three bits more than bfloat16, and B
    in half precision is exact. The tensor cores cut what TF32 has no bits for, so operands that have more are rounded
    before.
    """
    ROUNDS_S: tl.constexpr = PRECISION == "tf32"
    ROUNDS_B: tl.constexpr = ROUNDS_S and b_ptr.dtype.element_ty == tl.float32
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(first, end, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < end
        s_offsets = offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :]
        s = tl.load(s_ptr + s_offsets, mask=mask_m[:, None] & mask_r[None, :], other=0.0) * scale
        b_offsets = offs_r.to(tl.int64)[:, None] * stride_br + offs_n.to(tl.int64)[None, :] * stride_bn
        b = tl.load(b_ptr + b_offsets, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
        product = tl.dot(nearest_tf32(s) if ROUNDS_S else s, nearest_tf32(b) if ROUNDS_B else b, product, PRECISION)
    return product


@triton.jit(do_not_specialize=("M", "dropout_threshold"))
def rank_product_kernel(
    # pointers
    out_ptr, s_ptr, b_ptr, bias_ptr, seed_ptr, factor,
    # free
    M, dropout_threshold, keep_scale,
    # specialized
    N, R, stride_om, stride_sm, stride_bn, stride_br,
    # constexprs
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, RANKS: tl.constexpr, NUMBERS: tl.constexpr,
    FACTOR_IS_TENSOR: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    out_tile = out_ptr + offs_m.to(tl.int64)[:, None] * stride_om + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if ADDS:
        y = tl.load(out_tile, mask=mask, other=0.0)

    scale = load_scalar(factor, FACTOR_IS_TENSOR)
    if len(RANKS) > 0:
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # A loop that is not unrolled: of several lanes at once registers would hold the tiles.
        for i in range(len(RANKS)):
            first, end, lane = columns_of_lane(i, RANKS, NUMBERS)
            part = rank_steps(
                s_ptr, b_ptr, scale, first, end, offs_m, offs_n, mask_m, mask_n, stride_sm, stride_bn, stride_br,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            keep = keep_tile(tl.load(seed_ptr), lane, offs_m, pid_n * BLOCK_N, dropout_threshold, BLOCK_N)
            product += tl.where(keep, part, 0.0)
        product *= keep_scale
    else:
        product = rank_steps(
            s_ptr, b_ptr, scale, 0, R, offs_m, offs_n, mask_m, mask_n, stride_sm, stride_bn, stride_br,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        if HAS_DROPOUT:
            keep = keep_tile(tl.load(seed_ptr), NUMBERS[0], offs_m, pid_n * BLOCK_N, dropout_threshold, BLOCK_N)
            product = tl.where(keep, product, 0.0) * keep_scale
    if HAS_BIAS:
        product += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if ADDS:
        product += y.to(tl.float32)
    tl.store(out_tile, product, mask=mask)


_launch_narrow_product = Launcher(
    narrow_product_kernel, flags=("HAS_DROPOUT", "RANKS", "NUMBERS", "FACTOR_IS_TENSOR", "EXACT", "PRECISION")
)
_launch_rank_product = Launcher(
    rank_product_kernel, flags=("HAS_BIAS", "HAS_DROPOUT", "RANKS", "NUMBERS", "FACTOR_IS_TENSOR", "ADDS", "PRECISION")
)


def narrow_product(
    x: Tensor,
    a: Tensor,
    factor: float | Tensor,
    dropout: Dropout,
    exact: bool,
    config: NarrowProductConfig,
    out: Tensor | None = None,
    lanes: Lanes | None = None,
) -> Tensor:
    """Launch S = factor * drop(x) a^T and return S (M, r) float32.

    Args:
        x: (M, K). a: (r, K). factor: float or 0-d tensor; holds the dropout's keep_scale.
        dropout: of x, or ``NO_DROPOUT``.
        exact: keep all bits of a float32 ``a`` beside a half-precision x.
        out: S, where it is a part of a wider matrix's columns.
        lanes: of the dropout, where the rows of ``a`` have several; it has no lane of its own then.
    """
    (m, k), r = x.shape, a.shape[0]
    partials = partials_for(out, config.splits, m, r, x.device)
    ranks, numbers = lane_constants(dropout, lanes)

    _launch_narrow_product(
        grid_of(cdiv(m, config.BLOCK_M), r, ranks, config.BLOCK_R, config.splits),
        (x, a, partials, dropout.seed, factor),
        (blocks_of_range(k, config.BLOCK_K, config.splits), dropout.threshold),
        (m, k, r, *x.stride(), *a.stride(), partials.stride(-2)),
        (dropout.seed is not None, ranks, numbers, isinstance(factor, Tensor), exact, dot_precision(x.dtype)),
        config,
    )
    return summed(partials, config.splits, out)


def partials_for(out: Tensor | None, splits: int, m: int, r: int, device: torch.device) -> Tensor:
    """Where a launch leaves what makes S or dS (M, r): partial sums, or ``out`` where there are none."""
    if out is not None and splits == 1:
        return out
    return torch.empty(shape_of_partials(splits, m, r), dtype=torch.float32, device=device)


def summed(partials: Tensor, splits: int, out: Tensor | None) -> Tensor:
    """Their sum, in ``out`` if there is one."""
    return sum_partials(partials, splits) if out is None or splits == 1 else torch.sum(partials, 0, out=out)


def rank_product(
    term: RankProduct,
    bias: Tensor | None,
    dropout: Dropout,
    dtype: torch.dtype,
    config: RankProductConfig,
    lanes: Lanes | None = None,
) -> Tensor:
    """Launch out = bias + factor * drop'(s b^T) and return out (M, N) in ``dtype``.

    Args:
        term: s, b and factor. bias: (N,) or None.
        dropout: of the (M, N) product s b^T, or ``NO_DROPOUT``.
        lanes: of the dropout, where the columns of s and b have several: drop' is each lane's, of its own product.
    """
    out = torch.empty(term.s.shape[0], term.b.shape[0], dtype=dtype, device=term.s.device)
    _launch(out, term, bias, dropout, lanes, False, config)
    return out


def add_rank_product(
    y: Tensor, term: RankProduct, dropout: Dropout, config: RankProductConfig, lanes: Lanes | None = None
) -> None:
    """Launch y += factor * drop'(s b^T), in place; arguments as in ``rank_product``, y (M, N) with contiguous rows."""
    _launch(y, term, None, dropout, lanes, True, config)


def _launch(
    out: Tensor,
    term: RankProduct,
    bias: Tensor | None,
    dropout: Dropout,
    lanes: Lanes | None,
    adds: bool,
    config: RankProductConfig,
) -> None:
    m, n = out.shape
    s, b, factor = term
    precision = dot_precision(out.dtype) if out.dtype == torch.float32 else "tf32"

    _launch_rank_product(
        (cdiv(m, config.BLOCK_M), cdiv(n, config.BLOCK_N), 1),
        (out, s, b, bias, dropout.seed, factor),
        (m, dropout.threshold, dropout.keep_scale),
        (n, b.shape[1], out.stride(0), s.stride(0), *b.stride()),
        (
            bias is not None,
            dropout.seed is not None,
            *lane_constants(dropout, lanes),
            isinstance(factor, Tensor),
            adds,
            precision,
        ),
        config,
    )

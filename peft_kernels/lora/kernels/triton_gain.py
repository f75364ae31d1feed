"""LoRA linear with a gain on Triton: y from the base product, and what a backward pass reduces over dY.

Equation  gain_rank_product: y = g (P + f S B^T) + bias, rounded once
          gain_narrow_and_reduce: dS_part = f dY B', T_part = f dY^T S, dbias_part = sum dY and sums_part = sum dY * P,
          in one pass over dY; B' = g * B  (docs/design/lora.md)
Tensors   P (M, N) contiguous rows, dY (M, N), B (N, r), g, bias (N,): any strides, but contiguous elements of vectors;
          y (M, N); S, dS (M, r) float32, contiguous rows
          partial sums float32: dS (tiles of N, M, r), T (splits, N, r), dbias and sums (splits, N)
Tiles     as rank_product of triton_fwd.py, and narrow_and_reduce of triton_bwd.py
Bound     gain_rank_product: one read of P, one write of y | gain_narrow_and_reduce: one read of dY, and one of P
Refused   gain_narrow_and_reduce: r > BLOCK_R where dS or T is asked for; as triton_fwd.py otherwise
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
from peft_kernels.lora.kernels.config import NarrowAndReduceConfig, RankProductConfig
from peft_kernels.lora.kernels.triton_fwd import RankProduct, rank_steps


@triton.jit(do_not_specialize=("M",))
def gain_rank_product_kernel(
    # pointers
    out_ptr, product_ptr, s_ptr, b_ptr, gain_ptr, bias_ptr, factor,
    # free
    M,
    # specialized
    N, R, stride_om, stride_pm, stride_sm, stride_bn, stride_br,
    # constexprs
    HAS_BIAS: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    product = tl.load(product_ptr + rows * stride_pm + offs_n[None, :], mask=mask, other=0.0)

    total = rank_steps(
        s_ptr, b_ptr, load_scalar(factor, FACTOR_IS_TENSOR), 0, R, offs_m, offs_n, mask_m, mask_n,
        stride_sm, stride_bn, stride_br, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    total += product.to(tl.float32)
    total *= tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + rows * stride_om + offs_n[None, :], total, mask=mask)


@triton.jit(do_not_specialize=("blocks",))
def gain_narrow_and_reduce_kernel(
    # pointers
    dy_ptr, product_ptr, s_ptr, b_ptr, ds_ptr, t_ptr, dbias_ptr, sums_ptr, factor,
    # free
    blocks,
    # specialized
    M, N, R, stride_ym, stride_yn, stride_pm, stride_sm, stride_bn, stride_br, stride_dsm,
    # constexprs
    NEEDS_DS: tl.constexpr, NEEDS_T: tl.constexpr, NEEDS_DBIAS: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    FACTOR_IS_TENSOR: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
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
    t = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask_s = mask_m[:, None] & mask_r[None, :]
        mask_y = mask_m[:, None] & mask_n[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        dy = tl.load(dy_ptr + rows * stride_ym + offs_n.to(tl.int64)[None, :] * stride_yn, mask=mask_y, other=0.0)
        if NEEDS_T:
            s = tl.load(s_ptr + rows * stride_sm + offs_r[None, :], mask=mask_s, other=0.0)
            t = dot(tl.trans(dy), s, t, EXACT, PRECISION)
        if NEEDS_DS:
            ds = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), EXACT, PRECISION) * scale
            tl.store(ds_ptr + (pid_n.to(tl.int64) * M + rows) * stride_dsm + offs_r[None, :], ds, mask=mask_s)
        if NEEDS_DBIAS:
            dbias += tl.sum(dy.to(tl.float32), axis=0)
        if NEEDS_SUMS:
            product = tl.load(product_ptr + rows * stride_pm + offs_n[None, :], mask=mask_y, other=0.0)
            sums += tl.sum(dy.to(tl.float32) * product.to(tl.float32), axis=0)

    vector = pid_split.to(tl.int64) * N + offs_n
    if NEEDS_T:
        t_rows = t_ptr + (pid_split.to(tl.int64) * N + offs_n.to(tl.int64))[:, None] * R
        tl.store(t_rows + offs_r[None, :], t * scale, mask=mask_n[:, None] & mask_r[None, :])
    if NEEDS_DBIAS:
        tl.store(dbias_ptr + vector, dbias, mask=mask_n)
    if NEEDS_SUMS:
        tl.store(sums_ptr + vector, sums, mask=mask_n)


_launch_gain_rank_product = Launcher(gain_rank_product_kernel, flags=("HAS_BIAS", "FACTOR_IS_TENSOR", "PRECISION"))
_launch_gain_narrow_and_reduce = Launcher(
    gain_narrow_and_reduce_kernel,
    flags=("NEEDS_DS", "NEEDS_T", "NEEDS_DBIAS", "NEEDS_SUMS", "FACTOR_IS_TENSOR", "EXACT", "PRECISION"),
)


def gain_rank_product(
    product: Tensor, term: RankProduct, gain: Tensor, bias: Tensor | None, config: RankProductConfig
) -> Tensor:
    """Launch y = gain * (product + factor * s b^T) + bias and return y (M, N) in product's dtype.

    Args:
        product: (M, N) with contiguous rows. term: s, b and factor.
        gain: (N,), bias: (N,) or None, with contiguous elements.
    """
    m, n = product.shape
    s, b, factor = term
    out = torch.empty(m, n, dtype=product.dtype, device=product.device)
    precision = dot_precision(out.dtype) if out.dtype == torch.float32 else "tf32"

    _launch_gain_rank_product(
        (cdiv(m, config.BLOCK_M), cdiv(n, config.BLOCK_N), 1),
        (out, product, s, b, gain, bias, factor),
        (m,),
        (n, b.shape[1], out.stride(0), product.stride(0), s.stride(0), *b.stride()),
        (bias is not None, isinstance(factor, Tensor), precision),
        config,
    )
    return out


def gain_narrow_and_reduce(
    dy: Tensor,
    product: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    factor: float | Tensor,
    needs: tuple[bool, bool, bool, bool],
    r: int,
    exact: bool,
    config: NarrowAndReduceConfig,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Launch one pass over dy; return dS (M, r), T (N, r), dbias and sums (N,), float32, those that ``needs`` asks for.

    Args:
        dy: (M, N). product: (M, N) with contiguous rows, for the sums alone. s: (M, r) float32 with contiguous rows,
            for T alone. b: (N, r), for dS alone. factor: float or 0-d tensor.
        needs: of dS, T, dbias and the sums.
        exact: keep all bits of the float32 operands beside a half-precision dy.
    """
    m, n = dy.shape
    needs_ds, needs_t, needs_dbias, needs_sums = needs
    tiles_n = cdiv(n, config.BLOCK_N)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=dy.device)
    ds = empty(shape_of_partials(tiles_n, m, r)) if needs_ds else None
    t = empty(shape_of_partials(config.splits, n, r)) if needs_t else None
    dbias = empty(shape_of_partials(config.splits, n)) if needs_dbias else None
    sums = empty(shape_of_partials(config.splits, n)) if needs_sums else None

    _launch_gain_narrow_and_reduce(
        (tiles_n, config.splits, 1),
        (dy, product, s, b, ds, t, dbias, sums, factor),
        (blocks_of_range(m, config.BLOCK_M, config.splits),),
        (
            m,
            n,
            r,
            *dy.stride(),
            0 if product is None else product.stride(0),
            0 if s is None else s.stride(0),
            *((0, 0) if b is None else b.stride()),
            0 if ds is None else ds.stride(-2),
        ),
        (*needs, isinstance(factor, Tensor), exact, dot_precision(dy.dtype)),
        config,
    )
    return (
        None if ds is None else sum_partials(ds, tiles_n),
        None if t is None else sum_partials(t, config.splits),
        None if dbias is None else sum_partials(dbias, config.splits),
        None if sums is None else sum_partials(sums, config.splits),
    )

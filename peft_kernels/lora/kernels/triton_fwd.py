"""LoRA linear on Triton: the products that make an activation. Also used by the backward pass, with other operands.

Equation  narrow_product: S = f drop(x) A^T | product: y = x W^T + bias + f drop'(S B^T)
          add_rank_product: y += f drop'(S B^T), in place
          (Hu et al. 2021, section 4.1; f is the scale or 1 / (1 - p), drop' masks the product instead of x)
Tensors   x (M, K), W (N, K), A (r, K), B (N, r), bias (N,), y (M, N): any strides; S (M, r) float32, contiguous
          backward: dS is a narrow product of dY with B^T for A; dX a product of dY with W^T for W, dS for S, A^T for B
Tiles     narrow_product: a program owns BLOCK_M rows, BLOCK_R ranks and one of the ranges of K
          product: persistent programs walk (BLOCK_M, BLOCK_N) tiles | add_rank_product: a program owns one of them
Bound     narrow_product: one read of x | product: 2 M N (K + r) flops at the tensor cores' rate
          add_rank_product: one read and one write of y
Refused   M, N or K >= 2^31 (offsets are 64-bit, indices are not); float64
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_kernels._core.launch import Launcher, descriptor
from peft_kernels._core.tma import TMA_ALIGNMENT, tma_can_read
from peft_kernels._core.triton_math import dot, load_scalar, nearest_tf32, split_range, tile_of
from peft_kernels._core.triton_tools import blocks_of_range, cdiv, dot_precision, shape_of_partials, sum_partials
from peft_kernels.lora.kernels.config import AddRankProductConfig, NarrowProductConfig, ProductConfig
from peft_kernels.lora.kernels.dropout import Dropout
from peft_kernels.lora.kernels.triton_dropout import keep_tile


class RankProduct(NamedTuple):
    """The product factor * s b^T: s (M, r) float32, contiguous; b (N, r), any strides; factor a float or 0-d tensor."""

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
    M, K, R, stride_xm, stride_xk, stride_ar, stride_ak,
    # constexprs
    HAS_DROPOUT: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
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
            x = tl.where(keep_tile(tl.load(seed_ptr), offs_m, k, dropout_threshold, BLOCK_K), x, 0.0)
        acc = dot(x, a, acc, EXACT, PRECISION)

    acc = acc * load_scalar(factor, FACTOR_IS_TENSOR)
    s_rows = s_ptr + (pid_split.to(tl.int64) * M + offs_m.to(tl.int64))[:, None] * R
    tl.store(s_rows + offs_r[None, :], acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _rank_product(
    s_ptr, b_ptr, factor, offs_m, offs_n, M, N, R, stride_bn, stride_br, acc,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + factor * S B^T for one tile.

    Beside half-precision activations the product is TF32: S keeps float32's range and three bits more than bfloat16,
    and B in half precision is exact. (Compiled ahead of time for sm_90, it is one HGMMA for every 8 ranks.) The tensor
    cores cut what TF32 has no bits for, so operands that have more are rounded before.
    """
    ROUNDS_S: tl.constexpr = PRECISION == "tf32"
    ROUNDS_B: tl.constexpr = ROUNDS_S and b_ptr.dtype.element_ty == tl.float32
    # One stage: prefetching further rank blocks would take the shared memory that the K loop's stages fill.
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        s_mask = (offs_m < M)[:, None] & mask_r[None, :]
        b_mask = mask_r[:, None] & (offs_n < N)[None, :]
        s = tl.load(s_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :], mask=s_mask, other=0.0)
        b_offsets = offs_r.to(tl.int64)[:, None] * stride_br + offs_n.to(tl.int64)[None, :] * stride_bn
        b = tl.load(b_ptr + b_offsets, mask=b_mask, other=0.0).to(tl.float32)
        s = s * factor
        acc = tl.dot(nearest_tf32(s) if ROUNDS_S else s, nearest_tf32(b) if ROUNDS_B else b, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=("M", "dropout_threshold"))
def product_kernel(
    # pointers, or tensor descriptors of (BLOCK_M, BLOCK_K), (BLOCK_N, BLOCK_K) | (BLOCK_K, BLOCK_N), (BLOCK_M, BLOCK_N)
    x_ptr, w_ptr, y_ptr,
    # pointers
    s_ptr, b_ptr, bias_ptr, seed_ptr, factor,
    # free
    M, dropout_threshold, keep_scale,
    # specialized
    N, K, R, stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_br,
    # constexprs
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr,
    PRECISION: tl.constexpr, RANK_PRECISION: tl.constexpr,
    USE_TMA: tl.constexpr, W_ROWS_ARE_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    scale = load_scalar(factor, FACTOR_IS_TENSOR)
    DTYPE: tl.constexpr = x_ptr.dtype if USE_TMA else x_ptr.dtype.element_ty
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if USE_TMA:
                x = x_ptr.load([pid_m * BLOCK_M, k])
                w = w_ptr.load([k, pid_n * BLOCK_N]) if W_ROWS_ARE_K else w_ptr.load([pid_n * BLOCK_N, k]).T
            else:
                offs_k = k + tl.arange(0, BLOCK_K)
                mask_k = offs_k < K
                # Rows past the end wrap to valid ones: their products are never stored, and the loads need no row mask.
                x_offsets = (offs_m % M).to(tl.int64)[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
                w_offsets = offs_k.to(tl.int64)[:, None] * stride_wk + (offs_n % N).to(tl.int64)[None, :] * stride_wn
                x = tl.load(x_ptr + x_offsets, mask=mask_k[None, :], other=0.0)
                w = tl.load(w_ptr + w_offsets, mask=mask_k[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)

        if HAS_DROPOUT:
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            product = _rank_product(
                s_ptr, b_ptr, scale, offs_m, offs_n, M, N, R, stride_bn, stride_br, product,
                RANK_PRECISION, BLOCK_R,
            )  # fmt: skip
            keep = keep_tile(tl.load(seed_ptr), offs_m, pid_n * BLOCK_N, dropout_threshold, BLOCK_N)
            acc += tl.where(keep, product, 0.0) * keep_scale
        else:
            acc = _rank_product(
                s_ptr, b_ptr, scale, offs_m, offs_n, M, N, R, stride_bn, stride_br, acc,
                RANK_PRECISION, BLOCK_R,
            )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]

        if USE_TMA:
            y_ptr.store([pid_m * BLOCK_M, pid_n * BLOCK_N], acc.to(DTYPE))
        else:
            y_offsets = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
            tl.store(y_ptr + y_offsets, acc, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=("M", "dropout_threshold"))
def add_rank_product_kernel(
    # pointers
    y_ptr, s_ptr, b_ptr, seed_ptr, factor,
    # free
    M, dropout_threshold, keep_scale,
    # specialized
    N, R, stride_ym, stride_bn, stride_br,
    # constexprs
    HAS_DROPOUT: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr, RANK_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    y_tile = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :]
    y = tl.load(y_tile, mask=mask, other=0.0)
    product = _rank_product(
        s_ptr, b_ptr, load_scalar(factor, FACTOR_IS_TENSOR), offs_m, offs_n, M, N, R, stride_bn, stride_br,
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), RANK_PRECISION, BLOCK_R,
    )  # fmt: skip
    if HAS_DROPOUT:
        keep = keep_tile(tl.load(seed_ptr), offs_m, pid_n * BLOCK_N, dropout_threshold, BLOCK_N)
        product = tl.where(keep, product, 0.0) * keep_scale
    tl.store(y_tile, y.to(tl.float32) + product, mask=mask)


_launch_narrow_product = Launcher(
    narrow_product_kernel, flags=("HAS_DROPOUT", "FACTOR_IS_TENSOR", "EXACT", "PRECISION")
)
_launch_product = Launcher(
    product_kernel,
    flags=("HAS_BIAS", "HAS_DROPOUT", "FACTOR_IS_TENSOR", "PRECISION", "RANK_PRECISION", "W_ROWS_ARE_K"),
)
_launch_add_rank_product = Launcher(
    add_rank_product_kernel, flags=("HAS_DROPOUT", "FACTOR_IS_TENSOR", "RANK_PRECISION")
)


def narrow_product(
    x: Tensor, a: Tensor, factor: float | Tensor, dropout: Dropout, exact: bool, config: NarrowProductConfig
) -> Tensor:
    """Launch S = factor * drop(x) a^T and return S (M, r) float32.

    Args:
        x: (M, K). a: (r, K). factor: float or 0-d tensor; holds the dropout's keep_scale.
        dropout: of x, or ``NO_DROPOUT``.
        exact: keep all bits of a float32 ``a`` beside a half-precision x.
    """
    (m, k), r = x.shape, a.shape[0]
    partials = torch.empty(shape_of_partials(config.splits, m, r), dtype=torch.float32, device=x.device)

    _launch_narrow_product(
        (cdiv(m, config.BLOCK_M), cdiv(r, config.BLOCK_R), config.splits),
        (x, a, partials, dropout.seed, factor),
        (blocks_of_range(k, config.BLOCK_K, config.splits), dropout.threshold),
        (m, k, r, *x.stride(), *a.stride()),
        (dropout.seed is not None, isinstance(factor, Tensor), exact, dot_precision(x.dtype)),
        config,
    )
    return sum_partials(partials, config.splits)


def product(
    x: Tensor, w: Tensor, term: RankProduct, bias: Tensor | None, dropout: Dropout, sm_count: int, config: ProductConfig
) -> Tensor:
    """Launch y = x w^T + bias + factor * drop'(s b^T) and return y (M, N) in x's dtype.

    Args:
        x: (M, K). w: (N, K), any strides: a transposed view of a (K, N) matrix is read as it lies.
        term: s, b and factor. bias: (N,) or None.
        dropout: of the (M, N) product s b^T, or ``NO_DROPOUT``.
        sm_count: size of the persistent grid.
    """
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)

    rows_are_k = _rows_are_k(w)
    operands = _descriptors(x, w, y, rows_are_k, config) if config.USE_TMA else (x, w, y)
    s, b, factor = term
    precision = dot_precision(x.dtype)
    flags = (
        bias is not None, dropout.seed is not None, isinstance(factor, Tensor),
        precision, _rank_precision(x.dtype, precision), rows_are_k,
    )  # fmt: skip
    _launch_product(
        (min(sm_count, cdiv(m, config.BLOCK_M) * cdiv(n, config.BLOCK_N)), 1, 1),
        (*operands, s, b, bias, dropout.seed, factor),
        (m, dropout.threshold, dropout.keep_scale),
        (n, k, b.shape[1], *x.stride(), *w.stride(), *b.stride()),
        flags,
        config,
    )
    return y


def has_aligned_rows(x: Tensor, w: Tensor) -> bool:
    """Whether 16-byte copies, and so TMA, can move ``product``'s operands and a contiguous (M, N) result."""
    writes = w.shape[0] * x.element_size() % TMA_ALIGNMENT == 0
    return writes and tma_can_read(x) and tma_can_read(w, transposed=_rows_are_k(w))


def _rows_are_k(w: Tensor) -> bool:
    """Whether w (N, K) is the transposed view of a matrix that is stored by rows of N."""
    stride_n, stride_k = w.stride()
    return stride_n == 1 and stride_k != 1


def _descriptors(
    x: Tensor, w: Tensor, y: Tensor, rows_are_k: bool, config: ProductConfig
) -> tuple[TensorDescriptor, ...]:
    w_block = [config.BLOCK_K, config.BLOCK_N] if rows_are_k else [config.BLOCK_N, config.BLOCK_K]
    return (
        descriptor(x, [config.BLOCK_M, config.BLOCK_K]),
        descriptor(w, w_block, transposed=rows_are_k),
        descriptor(y, [config.BLOCK_M, config.BLOCK_N]),
    )


def _rank_precision(dtype: torch.dtype, precision: str) -> str:
    return precision if dtype == torch.float32 else "tf32"


def add_rank_product(y: Tensor, term: RankProduct, dropout: Dropout, config: AddRankProductConfig) -> None:
    """Launch y += factor * drop'(s b^T), in place; arguments as in ``product``, y (M, N) with contiguous rows."""
    m, n = y.shape
    s, b, factor = term

    _launch_add_rank_product(
        (cdiv(m, config.BLOCK_M), cdiv(n, config.BLOCK_N), 1),
        (y, s, b, dropout.seed, factor),
        (m, dropout.threshold, dropout.keep_scale),
        (n, b.shape[1], y.stride(0), *b.stride()),
        (dropout.seed is not None, isinstance(factor, Tensor), _rank_precision(y.dtype, dot_precision(y.dtype))),
        config,
    )

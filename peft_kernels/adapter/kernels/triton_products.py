"""The two products of a bottleneck, as device functions: into it over all columns, and out of it tile by tile."""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels._core.triton_math import dot, nearest_tf32


@triton.jit
def into_bottleneck(
    t_ptr, w_ptr, offs_m, offs_r, first, last, M, C, R, stride_tm, stride_tc, stride_wr, stride_wc,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """t w^T over the columns from ``first`` to ``last``: t (M, C), w (R, C), the result (BLOCK_M, BLOCK_R) float32."""
    mask_m, mask_r = offs_m < M, offs_r < R
    t_rows = t_ptr + offs_m.to(tl.int64)[:, None] * stride_tm
    w_rows = w_ptr + offs_r.to(tl.int64)[None, :] * stride_wr
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for c in range(first, last, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        t = tl.load(
            t_rows + offs_c.to(tl.int64)[None, :] * stride_tc, mask=mask_m[:, None] & mask_c[None, :], other=0.0
        )
        w = tl.load(
            w_rows + offs_c.to(tl.int64)[:, None] * stride_wc, mask=mask_c[:, None] & mask_r[None, :], other=0.0
        )
        acc = dot(t, w, acc, EXACT, PRECISION)
    return acc


@triton.jit
def out_of_bottleneck(
    u, w_ptr, acc, offs_r, offs_c, R, C, stride_wr, stride_wc,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + u w for a tile of columns: u (BLOCK_M, BLOCK_R) float32, w (R, C).

    u is rounded to w's dtype, as eager torch rounds what it stores between the two products. The tensor cores cut what
    TF32 has no bits for, so float32 operands are rounded before.
    """
    mask = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    w_offsets = offs_r.to(tl.int64)[:, None] * stride_wr + offs_c.to(tl.int64)[None, :] * stride_wc
    w = tl.load(w_ptr + w_offsets, mask=mask, other=0.0)
    if w.dtype != tl.float32:
        return tl.dot(u.to(w.dtype), w, acc)
    elif PRECISION == "tf32":
        return tl.dot(nearest_tf32(u), nearest_tf32(w), acc, input_precision="tf32")
    else:
        return tl.dot(u, w, acc, input_precision=PRECISION)


@triton.jit
def load_addends(
    bias_ptr, residual_ptr, offs_m, offs_c, M, C, stride_rm, stride_rc,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The bias (BLOCK_C,) and the residual (BLOCK_M, BLOCK_C) of a tile as they are stored; zeros where none is."""
    bias = tl.zeros(offs_c.shape, tl.float32)
    residual = tl.zeros((offs_m.shape[0], offs_c.shape[0]), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0)
    if HAS_RESIDUAL:
        mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
        offsets = offs_m.to(tl.int64)[:, None] * stride_rm + offs_c.to(tl.int64)[None, :] * stride_rc
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
    return bias, residual


@triton.jit
def store_sum(out_ptr, acc, bias, residual, scale, offs_m, offs_c, M, C):
    """out = residual + scale (acc + bias) for one tile, rounded once; out (M, C) is contiguous."""
    total = (acc + bias.to(tl.float32)[None, :]) * scale + residual.to(tl.float32)
    tile = out_ptr + offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(tile, total, mask=(offs_m < M)[:, None] & (offs_c < C)[None, :])


@triton.jit
def write_rows(
    u, w_ptr, bias_ptr, residual_ptr, out_ptr, scale, offs_m, offs_r, M, C, R,
    stride_wr, stride_wc, stride_rm, stride_rc,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = residual + scale (u w + bias) for all columns of a block of rows: u (BLOCK_M, BLOCK_R) float32, w (R, C).

    From the last column to the first: where the residual was read before, its last columns are those that L2 still
    holds. What is added is loaded a tile ahead, because the compiler pipelines only what a product reads.
    """
    last = tl.cdiv(C, BLOCK_C) - 1
    bias, residual = load_addends(
        bias_ptr, residual_ptr, offs_m, last * BLOCK_C + tl.arange(0, BLOCK_C), M, C, stride_rm, stride_rc,
        HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    for i in range(last, -1, -1):
        offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        next_c = tl.maximum(i - 1, 0) * BLOCK_C + tl.arange(0, BLOCK_C)
        next_bias, next_residual = load_addends(
            bias_ptr, residual_ptr, offs_m, next_c, M, C, stride_rm, stride_rc, HAS_BIAS, HAS_RESIDUAL
        )  # fmt: skip
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        acc = out_of_bottleneck(u, w_ptr, acc, offs_r, offs_c, R, C, stride_wr, stride_wc, PRECISION)
        store_sum(out_ptr, acc, bias, residual, scale, offs_m, offs_c, M, C)
        bias, residual = next_bias, next_residual

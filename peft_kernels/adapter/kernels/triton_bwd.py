"""Bottleneck adapter on Triton: the backward pass. The split path borrows the products of triton_fwd.py.

Equation  dz = s (dy Wu) * act'(z);  dx = dz Wd (+ dy, serial) | dWd = dz^T x;  dWu = s dy^T act(z);  dbu = s sum dy
          (derived in docs/design/adapter.md)
Tensors   dy (M, N), x (M, K), Wd (r, K), Wu (N, r): any strides; z, dz (M, r) float32, contiguous; dx (M, K)
          partial sums float32: dWd (splits, r, K), dWu (splits, N, r), dbu (splits, N)
Tiles     bottleneck_grad: a program owns BLOCK_M rows and makes both products of them
          reduce_rows: a program owns BLOCK_C columns of dy or x, BLOCK_R of the bottleneck and one of the ranges of
          rows; partials are summed in a fixed order, so two runs give the same bits
Bound     bottleneck_grad: dy in, dx out; the rows of dy are read again from L2 where it is serial
          reduce_rows: one read of dy or x
Refused   as triton_fwd.py
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_math import dot, load_scalar, split_range
from peft_kernels._core.triton_tools import blocks_of_range, cdiv, is_stored_by_columns, shape_of_partials, sum_partials
from peft_kernels.adapter.kernels.config import BottleneckConfig, ReduceRowsConfig
from peft_kernels.adapter.kernels.triton_activations import activate, activation_grad
from peft_kernels.adapter.kernels.triton_products import into_bottleneck, write_rows

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=("M",))
def bottleneck_grad_kernel(
    # pointers
    dy_ptr, wu_ptr, wd_ptr, z_ptr, dz_ptr, dx_ptr, factor,
    # specialized; M, which varies, only on request
    M, N, K, R, stride_ym, stride_yn, stride_wun, stride_wur, stride_wdr, stride_wdk,
    # constexprs
    ACTIVATION: tl.constexpr, SERIAL: tl.constexpr, NEEDS_DX: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, OUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_z = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    z_offsets = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    dz = into_bottleneck(
        dy_ptr, wu_ptr, offs_m, offs_r, 0, N, M, N, R, stride_ym, stride_yn, stride_wur, stride_wun,
        EXACT, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    dz = dz * load_scalar(factor, FACTOR_IS_TENSOR)
    dz = dz * activation_grad(tl.load(z_ptr + z_offsets, mask=mask_z, other=0.0), ACTIVATION)
    tl.store(dz_ptr + z_offsets, dz, mask=mask_z)

    if NEEDS_DX:
        write_rows(
            dz, wd_ptr, None, dy_ptr, dx_ptr, 1.0, offs_m, offs_r, M, K, R,
            stride_wdr, stride_wdk, stride_ym, stride_yn,
            False, SERIAL, OUT_PRECISION, BLOCK_M, BLOCK_O,
        )  # fmt: skip


@triton.jit(do_not_specialize=("blocks",))
def reduce_rows_kernel(
    # pointers
    t_ptr, u_ptr, out_ptr, sums_ptr, factor,
    # free
    blocks,
    # specialized
    M, C, R, stride_tm, stride_tc, stride_or, stride_oc,
    # constexprs
    ACTIVATION: tl.constexpr, NEEDS_PRODUCT: tl.constexpr, NEEDS_SUMS: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr,
    OPERAND: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_c, pid_r, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R

    first, last = split_range(pid_split, M, blocks, BLOCK_M)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        rows = offs_m.to(tl.int64)[:, None]
        t_offsets = rows * stride_tm + offs_c.to(tl.int64)[None, :] * stride_tc
        t = tl.load(t_ptr + t_offsets, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        if NEEDS_PRODUCT:
            u = tl.load(u_ptr + rows * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            # Rows past the end meet zeros of t, so that act(0) need not be zero.
            acc = dot(tl.trans(activate(u, ACTIVATION).to(OPERAND)), t, acc, EXACT, PRECISION)
        if NEEDS_SUMS:
            sums += tl.sum(t.to(tl.float32), axis=0)

    scale = load_scalar(factor, FACTOR_IS_TENSOR)
    if NEEDS_PRODUCT:
        out_rows = out_ptr + pid_split.to(tl.int64) * C * R + offs_r.to(tl.int64)[:, None] * stride_or
        out_tile = out_rows + offs_c.to(tl.int64)[None, :] * stride_oc
        tl.store(out_tile, acc * scale, mask=mask_r[:, None] & mask_c[None, :])
    if NEEDS_SUMS:
        # Every program of the bottleneck's blocks has the same sums.
        tl.store(sums_ptr + pid_split.to(tl.int64) * C + offs_c, sums * scale, mask=mask_c & (pid_r == 0))


# As in triton_fwd.py.
_GRAD_FLAGS = ("ACTIVATION", "SERIAL", "NEEDS_DX", "FACTOR_IS_TENSOR", "EXACT", "PRECISION", "OUT_PRECISION")
_launch_bottleneck_grad = Launcher(bottleneck_grad_kernel, _GRAD_FLAGS)
_launch_bottleneck_grad_knowing_m = Launcher(triton.jit(bottleneck_grad_kernel.fn), _GRAD_FLAGS)
_launch_reduce_rows = Launcher(
    reduce_rows_kernel,
    flags=("ACTIVATION", "NEEDS_PRODUCT", "NEEDS_SUMS", "FACTOR_IS_TENSOR", "OPERAND", "EXACT", "PRECISION"),
)


def bottleneck_grad(
    dy: Tensor,
    weights: tuple[Tensor | None, Tensor],
    z: Tensor,
    factor: float | Tensor,
    activation: str,
    serial: bool,
    dx_dtype: torch.dtype,
    precisions: tuple[bool, str, str],
    config: BottleneckConfig,
) -> tuple[Tensor | None, Tensor]:
    """Launch both products of the backward pass at once and return dx (M, K), or None, and dz (M, r) float32.

    Args:
        dy: (M, N). weights: Wd (r, K), None where dx is not needed, and Wu (N, r). z: (M, r) float32, contiguous.
        factor: float or 0-d tensor. serial: whether dx has dy in it. precisions: as in ``triton_fwd.bottleneck``.
    """
    (wd, wu), (exact, precision, out_precision) = weights, precisions
    (m, n), r = dy.shape, z.shape[1]
    k, wd_strides = (0, (0, 0)) if wd is None else (wd.shape[1], wd.stride())
    dz = torch.empty_like(z)
    dx = torch.empty(m, k, dtype=dx_dtype, device=dy.device) if wd is not None else None

    launch = _launch_bottleneck_grad_knowing_m if is_stored_by_columns(dy) else _launch_bottleneck_grad
    launch(
        (cdiv(m, config.BLOCK_M), 1, 1),
        (dy, wu, wd, z, dz, dx, factor),
        (),
        (m, n, k, r, *dy.stride(), *wu.stride(), *wd_strides),
        (activation, serial, wd is not None, isinstance(factor, Tensor), exact, precision, out_precision),
        config,
    )
    return dx, dz


def reduce_rows(
    t: Tensor,
    u: Tensor | None,
    factor: float | Tensor,
    activation: str,
    t_first: bool,
    needs: tuple[bool, bool],
    r: int,
    operand: torch.dtype,
    precisions: tuple[bool, str, str],
    config: ReduceRowsConfig,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch factor * act(u)^T t and factor * the sum of t over rows (C,); return them float32, as ``needs`` asks.

    Args:
        t: (M, C). u: (M, r) float32, contiguous, for the product alone. factor: float or 0-d tensor.
        t_first: whether the result is (C, r), as Wu is stored, or (r, C), as Wd is.
        operand: dtype that act(u) is rounded to for the product: the weight's.
    """
    (m, c), (needs_product, needs_sums) = t.shape, needs
    exact, precision, _ = precisions
    shape, strides = ((c, r), (1, r)) if t_first else ((r, c), (c, 1))
    empty = functools.partial(torch.empty, dtype=torch.float32, device=t.device)
    partials = empty(shape_of_partials(config.splits, *shape)) if needs_product else None
    sums = empty(shape_of_partials(config.splits, c)) if needs_sums else None

    _launch_reduce_rows(
        (cdiv(c, config.BLOCK_C), cdiv(r, config.BLOCK_R) if needs_product else 1, config.splits),
        (t, u, partials, sums, factor),
        (blocks_of_range(m, config.BLOCK_M, config.splits),),
        (m, c, r, *t.stride(), *strides),
        (activation, *needs, isinstance(factor, Tensor), _OPERANDS[operand], exact, precision),
        config,
    )
    product, total = (None if parts is None else sum_partials(parts, config.splits) for parts in (partials, sums))
    return product, total

"""Bottleneck adapter on Triton: the forward pass, in one launch or in two.

Equation  z = x Wd^T + bd;  y = residual + s (act(z) Wu^T + bu)     (Houlsby et al. 2019, arXiv:1902.00751)
Tensors   x (M, K), Wd (r, K), Wu (N, r), residual (M, N): any strides; bd (r,), bu (N,); z (M, r) float32, y (M, N)
Tiles     bottleneck: a program owns BLOCK_M rows and makes both products of them
          narrow_product: a program owns (BLOCK_M, BLOCK_R) of z and one of the ranges of K
          wide_product: a program owns a (BLOCK_M, BLOCK_C) tile of y
Bound     bottleneck: x in, y out, and the residual where it is not x, whose rows are read again from L2; 4 r M K flops
          narrow_product and wide_product: x twice, and z out and back
Refused   M, N or K >= 2^31 (offsets are 64-bit, indices are not); float64; bottleneck: r > BLOCK_R
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_math import load_scalar, split_range
from peft_kernels._core.triton_tools import blocks_of_range, cdiv, is_stored_by_columns, shape_of_partials, sum_partials
from peft_kernels.adapter.kernels.config import BottleneckConfig, NarrowProductConfig, WideProductConfig
from peft_kernels.adapter.kernels.triton_activations import activate, activation_grad
from peft_kernels.adapter.kernels.triton_products import (
    into_bottleneck,
    load_addends,
    out_of_bottleneck,
    store_sum,
    write_rows,
)


@triton.jit(do_not_specialize=("M",))
def bottleneck_kernel(
    # pointers
    x_ptr, wd_ptr, bd_ptr, wu_ptr, bu_ptr, residual_ptr, z_ptr, y_ptr, factor,
    # specialized; M, which varies, only on request
    M, N, K, R, stride_xm, stride_xk, stride_wdr, stride_wdk, stride_wun, stride_wur, stride_rm, stride_rn,
    # constexprs
    ACTIVATION: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    FACTOR_IS_TENSOR: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, OUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    z = into_bottleneck(
        x_ptr, wd_ptr, offs_m, offs_r, 0, K, M, K, R, stride_xm, stride_xk, stride_wdr, stride_wdk,
        EXACT, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    if HAS_DOWN_BIAS:
        z += tl.load(bd_ptr + offs_r, mask=offs_r < R, other=0.0).to(tl.float32)[None, :]
    z_rows = z_ptr + offs_m.to(tl.int64)[:, None] * R
    tl.store(z_rows + offs_r[None, :], z, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])

    # Padded columns of h may be anything finite: the rows of Wu^T that they meet are zero.
    write_rows(
        activate(z, ACTIVATION), wu_ptr, bu_ptr, residual_ptr, y_ptr, load_scalar(factor, FACTOR_IS_TENSOR),
        offs_m, offs_r, M, N, R, stride_wur, stride_wun, stride_rm, stride_rn,
        HAS_UP_BIAS, HAS_RESIDUAL, OUT_PRECISION, BLOCK_M, BLOCK_O,
    )  # fmt: skip


@triton.jit(do_not_specialize=("blocks",))
def narrow_product_kernel(
    # pointers
    t_ptr, w_ptr, bias_ptr, z_ptr, out_ptr, factor,
    # free
    blocks,
    # specialized
    M, C, R, stride_tm, stride_tc, stride_wr, stride_wc,
    # constexprs
    GRAD_OF: tl.constexpr, HAS_BIAS: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    rows = offs_m.to(tl.int64)[:, None]

    first, last = split_range(pid_split, C, blocks, BLOCK_C)
    acc = into_bottleneck(
        t_ptr, w_ptr, offs_m, offs_r, first, last, M, C, R, stride_tm, stride_tc, stride_wr, stride_wc,
        EXACT, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    if HAS_BIAS:
        # The sum over the ranges has the bias once.
        bias = tl.load(bias_ptr + offs_r, mask=(offs_r < R) & (pid_split == 0), other=0.0)
        acc += bias.to(tl.float32)[None, :]
    acc = acc * load_scalar(factor, FACTOR_IS_TENSOR)
    if GRAD_OF is not None:
        # Linear in the partial product, so that it may come before the sum over the ranges.
        z = tl.load(z_ptr + rows * R + offs_r[None, :], mask=mask, other=0.0)
        acc = acc * activation_grad(z, GRAD_OF)
    tl.store(out_ptr + (pid_split.to(tl.int64) * M + rows) * R + offs_r[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=("M",))
def wide_product_kernel(
    # pointers
    u_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, factor,
    # specialized; M, which varies, only on request
    M, C, R, stride_um, stride_wr, stride_wc, stride_rm, stride_rc,
    # constexprs
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, FACTOR_IS_TENSOR: tl.constexpr,
    OUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # A stride of its own, though it equals R: with R float32 products spill on sm_100.
    u_rows = u_ptr + offs_m.to(tl.int64)[:, None] * stride_um
    # Before the product, which hides their latency.
    bias, residual = load_addends(
        bias_ptr, residual_ptr, offs_m, offs_c, M, C, stride_rm, stride_rc, HAS_BIAS, HAS_RESIDUAL
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        u = tl.load(u_rows + offs_r[None, :], mask=(offs_m < M)[:, None] & (offs_r < R)[None, :], other=0.0)
        u = activate(u, ACTIVATION)
        acc = out_of_bottleneck(u, w_ptr, acc, offs_r, offs_c, R, C, stride_wr, stride_wc, OUT_PRECISION)
    store_sum(out_ptr, acc, bias, residual, load_scalar(factor, FACTOR_IS_TENSOR), offs_m, offs_c, M, C)


# Masks over M cut the vectors of activations that are stored by columns, unless M is known to be a multiple of 16.
_BOTTLENECK_FLAGS = (
    "ACTIVATION", "HAS_DOWN_BIAS", "HAS_UP_BIAS", "HAS_RESIDUAL", "FACTOR_IS_TENSOR",
    "EXACT", "PRECISION", "OUT_PRECISION",
)  # fmt: skip
_launch_bottleneck = Launcher(bottleneck_kernel, _BOTTLENECK_FLAGS)
_launch_bottleneck_knowing_m = Launcher(triton.jit(bottleneck_kernel.fn), _BOTTLENECK_FLAGS)
_launch_narrow_product = Launcher(
    narrow_product_kernel, flags=("GRAD_OF", "HAS_BIAS", "FACTOR_IS_TENSOR", "EXACT", "PRECISION")
)
_WIDE_PRODUCT_FLAGS = ("ACTIVATION", "HAS_BIAS", "HAS_RESIDUAL", "FACTOR_IS_TENSOR", "OUT_PRECISION")
_launch_wide_product = Launcher(wide_product_kernel, _WIDE_PRODUCT_FLAGS)
_launch_wide_product_knowing_m = Launcher(triton.jit(wide_product_kernel.fn), _WIDE_PRODUCT_FLAGS)


def bottleneck(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    factor: float | Tensor,
    activation: str,
    out_dtype: torch.dtype,
    precisions: tuple[bool, str, str],
    config: BottleneckConfig,
) -> tuple[Tensor, Tensor]:
    """Launch both products at once and return y (M, N) in ``out_dtype`` and z (M, r) float32.

    Args:
        x: (M, K). weights: Wd (r, K) and Wu (N, r). biases: bd (r,) and bu (N,), or None each.
        residual: (M, N), may be x itself, or None. factor: float or 0-d tensor.
        precisions: whether a float32 weight keeps its bits beside a half-precision x; Triton's names for what float32
            products of the first and of the second kind may do.
    """
    (wd, wu), (bd, bu), (exact, precision, out_precision) = weights, biases, precisions
    (m, k), (n, r) = x.shape, wu.shape
    z = torch.empty(m, r, dtype=torch.float32, device=x.device)
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)

    flags = (
        activation, bd is not None, bu is not None, residual is not None, isinstance(factor, Tensor),
        exact, precision, out_precision,
    )  # fmt: skip
    launch = _launch_bottleneck_knowing_m if is_stored_by_columns(x, residual) else _launch_bottleneck
    launch(
        (cdiv(m, config.BLOCK_M), 1, 1),
        (x, wd, bd, wu, bu, residual, z, y, factor),
        (),
        (m, n, k, r, *x.stride(), *wd.stride(), *wu.stride(), *_strides(residual)),
        flags,
        config,
    )
    return y, z


def narrow_product(
    t: Tensor,
    w: Tensor,
    bias: Tensor | None,
    factor: float | Tensor,
    grad_at: tuple[str, Tensor] | None,
    precisions: tuple[bool, str, str],
    config: NarrowProductConfig,
) -> Tensor:
    """Launch factor * (t w^T + bias), times an activation's derivative at z, and return it (M, r) float32.

    Args:
        t: (M, C). w: (r, C), any strides. bias: (r,) or None.
        grad_at: the activation and z (M, r) float32, contiguous; or None.
    """
    (m, c), r = t.shape, w.shape[0]
    exact, precision, _ = precisions
    activation, z = grad_at if grad_at is not None else (None, None)
    partials = torch.empty(shape_of_partials(config.splits, m, r), dtype=torch.float32, device=t.device)

    _launch_narrow_product(
        (cdiv(m, config.BLOCK_M), cdiv(r, config.BLOCK_R), config.splits),
        (t, w, bias, z, partials, factor),
        (blocks_of_range(c, config.BLOCK_C, config.splits),),
        (m, c, r, *t.stride(), *w.stride()),
        (activation, bias is not None, isinstance(factor, Tensor), exact, precision),
        config,
    )
    return sum_partials(partials, config.splits)


def wide_product(
    u: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    factor: float | Tensor,
    activation: str,
    out_dtype: torch.dtype,
    precisions: tuple[bool, str, str],
    config: WideProductConfig,
) -> Tensor:
    """Launch residual + factor * (act(u) w + bias) and return it (M, C) in ``out_dtype``.

    Args:
        u: (M, r) float32, contiguous. w: (r, C), any strides. bias: (C,) or None. residual: (M, C) or None.
    """
    (m, r), c = u.shape, w.shape[1]
    out = torch.empty(m, c, dtype=out_dtype, device=u.device)

    launch = _launch_wide_product_knowing_m if is_stored_by_columns(residual) else _launch_wide_product
    launch(
        (cdiv(m, config.BLOCK_M), cdiv(c, config.BLOCK_C), 1),
        (u, w, bias, residual, out, factor),
        (),
        (m, c, r, u.stride(0), *w.stride(), *_strides(residual)),
        (activation, bias is not None, residual is not None, isinstance(factor, Tensor), precisions[2]),
        config,
    )
    return out


def _strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()

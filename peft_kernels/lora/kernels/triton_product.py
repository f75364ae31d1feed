"""LoRA linear on Triton: a product whose rows have the same bits in any batch, where cuBLAS's promise none.

Equation  out = left right + bias | out += left right, in place
          y = x W^T + bias with W^T for right, dX = dY W with W (Hu et al. 2021, section 4.1)
Tensors   left (M, K), right (K, N), bias (N,): any strides; out (M, N) with contiguous rows
Tiles     a program owns a (BLOCK_M, BLOCK_N) tile and walks all of K; tiles go down the rows GROUP_M at a time, so that
          they find their columns of right in L2. The order of a row's sums is that of the tile's size, which M is no
          part of
Bound     the tensor cores, 2 M N K flops; with few rows one read of right
Refused   M, N or K >= 2^31 (offsets are 64-bit, indices are not); float64
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels._core.launch import Launcher
from peft_kernels._core.triton_tools import cdiv, dot_precision
from peft_kernels.lora.kernels.config import ProductConfig


@triton.jit(do_not_specialize=("M",))
def product_kernel(
    # pointers
    out_ptr, left_ptr, right_ptr, bias_ptr,
    # free
    M,
    # specialized
    N, K, stride_om, stride_lm, stride_lk, stride_rk, stride_rn,
    # constexprs
    HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    rows_of_group = min(tiles_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * tiles_n) % rows_of_group
    pid_n = pid % (GROUP_M * tiles_n) // rows_of_group
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    left_rows = left_ptr + offs_m.to(tl.int64)[:, None] * stride_lm
    right_cols = right_ptr + offs_n.to(tl.int64)[None, :] * stride_rn

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        left = tl.load(
            left_rows + offs_k.to(tl.int64)[None, :] * stride_lk, mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        right = tl.load(
            right_cols + offs_k.to(tl.int64)[:, None] * stride_rk, mask=mask_k[:, None] & mask_n[None, :], other=0.0
        )
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_tile = out_ptr + offs_m.to(tl.int64)[:, None] * stride_om + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if ADDS:
        acc += tl.load(out_tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_tile, acc, mask=mask)


_launch_product = Launcher(product_kernel, flags=("HAS_BIAS", "ADDS", "PRECISION"))


def product(left: Tensor, right: Tensor, bias: Tensor | None, config: ProductConfig) -> Tensor:
    """Launch out = left right + bias and return out (M, N) in left's dtype.

    Args:
        left: (M, K). right: (K, N). bias: (N,) with contiguous elements, or None.
    """
    out = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    _launch(out, left, right, bias, False, config)
    return out


def add_product(out: Tensor, left: Tensor, right: Tensor, config: ProductConfig) -> None:
    """Launch out += left right, in place; arguments as in ``product``, out (M, N) with contiguous rows."""
    _launch(out, left, right, None, True, config)


def _launch(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, adds: bool, config: ProductConfig) -> None:
    (m, k), n = left.shape, right.shape[1]

    _launch_product(
        (cdiv(m, config.BLOCK_M) * cdiv(n, config.BLOCK_N), 1, 1),
        (out, left, right, bias),
        (m,),
        (n, k, out.stride(0), *left.stride(), *right.stride()),
        (bias is not None, adds, dot_precision(left.dtype)),
        config,
    )

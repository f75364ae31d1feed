"""Products of the torch backends, where BLAS would lose what eager torch keeps, or takes many times as long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

FEW_ROWS = 16
_CAST_ELEMENTS = 1 << 22  # of an operand that are in float32 at a time: 16 MB


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """out += scale left right, in place, for matrices of one dtype, and return out."""
    if out.shape[0] <= FEW_ROWS and out.device.type == "cpu":
        # For one row, or factors of some strides, BLAS adds each term to out on its own, each with out's rounding.
        return out.add_(left @ right, alpha=scale)
    return out.addmm_(left, right, alpha=scale)


def is_slow(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products of ``dtype`` take longer than casts to float32, and products of that.

    That is float16 on an x86 processor without instructions for it. There torch multiplies it by loops of its own,
    which take 4 times as long from 16 rows on, and 90 times where the second factor is stored by the rows of the sum
    (one core, AVX-512, M = 512, K = N = 1024, torch 2.13).
    """
    return dtype == torch.float16 and device_type == "cpu" and _casts_float16()


def product_in_float32(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """left right + bias of float16 matrices, rounded once; a block of each factor is cast at a time.

    Args:
        multiply: makes the products of float32 matrices.
    """
    out = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    for rows in _ranges(*left.shape):
        wide = left[rows].float()
        for cols in _ranges(right.shape[1], right.shape[0]):
            product = multiply(wide, right[:, cols].float())
            out[rows, cols] = product if bias is None else product.add_(bias[cols])
    return out


def _ranges(count: int, width: int) -> Iterator[slice]:
    step = max(1, _CAST_ELEMENTS // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@cache
def _casts_float16() -> bool:
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    has_instructions = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return is_x86 and not has_instructions


@cache
def has_bfloat16_products() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

"""Products of the torch backends, where BLAS would lose what eager torch keeps, or time."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_FEW_ROWS = 16


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """out += scale left right, in place, for matrices of one dtype, and return out."""
    if out.shape[0] <= _FEW_ROWS and out.device.type == "cpu":
        # For one row, or factors of some strides, BLAS adds each term to out on its own, each with out's rounding.
        return out.add_(left @ right, alpha=scale)
    return out.addmm_(left, right, alpha=scale)


def is_slow(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products of ``dtype`` take longer than casts to float32, and products of that.

    That is float16 on a CPU without instructions for it: 10 to 80 times as long for products of 512 rows, 1024 columns
    and 16 or 64 terms (torch 2.13, one thread of an AMD EPYC), because they are made one element at a time.
    """
    return dtype == torch.float16 and device_type == "cpu" and not _has_float16()


@cache
def _has_float16() -> bool:
    """Whether torch says that this machine's CPU multiplies float16 itself."""
    supported = getattr(torch.cpu, "_is_amx_fp16_supported", None)
    return supported is not None and bool(supported())

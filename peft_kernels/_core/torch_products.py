"""Products of the torch backends, where BLAS would lose what eager torch keeps."""

from __future__ import annotations

from torch import Tensor

_FEW_ROWS = 16


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """out += scale left right, in place, for matrices of one dtype, and return out."""
    if out.shape[0] <= _FEW_ROWS and out.device.type == "cpu":
        # For one row, or factors of some strides, BLAS adds each term to out on its own, each with out's rounding.
        return out.add_(left @ right, alpha=scale)
    return out.addmm_(left, right, alpha=scale)

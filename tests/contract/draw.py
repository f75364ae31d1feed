"""Random values, dtypes and layouts that the families' cases have in common."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a problem, and of its adapter where that is another.
DTYPES = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}

MATRIX_LAYOUTS = ("rows", "columns", "strided", "expanded")


def dtypes_name(*dtypes: torch.dtype | None) -> str:
    return "+".join(_SHORT[dtype] for dtype in dtypes if dtype)


class Draw:
    """Float64 values from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * std

    def integers(self, largest: int, *shape: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=self.generator, dtype=torch.float64)

    def single_signs(self, rows: int, cols: int) -> Tensor:
        """One 1 or -1 in each row."""
        where = torch.randint(0, cols, (rows, 1), generator=self.generator)
        return torch.zeros(rows, cols, dtype=torch.float64).scatter_(1, where, 2 * (where % 2).double() - 1)


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The matrix in one of MATRIX_LAYOUTS; "expanded" repeats its first row."""
    if layout == "columns":
        return matrix.t().contiguous().t()
    if layout == "strided":
        return torch.stack((matrix, matrix.flip(1)), dim=-1)[..., 0]
    return matrix[:1].expand_as(matrix) if layout == "expanded" else matrix

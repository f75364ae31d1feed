"""What Hopper's TMA asks of a matrix: contiguous rows; base and row stride multiples of 16 bytes."""

from __future__ import annotations

from torch import Tensor

TMA_ALIGNMENT = 16


def tma_can_read(matrix: Tensor) -> bool:
    """Whether a matrix meets TMA's rules; dimensions before its own are of several matrices."""
    (*_, rows, cols), (*steps, stride, inner) = matrix.shape, matrix.stride()
    return (
        rows > 0
        and cols > 0
        and inner == 1
        and stride >= cols
        and all(step * matrix.element_size() % TMA_ALIGNMENT == 0 for step in (*steps, stride))
        and all(step > 0 for step in steps)
        and matrix.data_ptr() % TMA_ALIGNMENT == 0
    )


def readable(matrix: Tensor) -> Tensor:
    """The matrix as TMA can read it: itself, or a copy whose rows are padded to multiples of 16 bytes."""
    if tma_can_read(matrix):
        return matrix
    rows, cols = matrix.shape
    padding = -cols % (TMA_ALIGNMENT // matrix.element_size())
    return matrix.new_empty(rows, cols + padding)[:, :cols].copy_(matrix)

"""What TMA can read of a matrix, and the copy of one that it cannot."""

from __future__ import annotations

import pytest
import torch

from peft_kernels._core import tma


@pytest.mark.parametrize(
    ("matrix", "readable"),
    [
        (torch.ones(4, 16, dtype=torch.bfloat16), True),
        (torch.ones(4, 15, dtype=torch.bfloat16), False),
        (torch.ones(4, 24, dtype=torch.bfloat16)[:, :15], True),
        (torch.ones(4, 24, dtype=torch.bfloat16)[:, 1:], False),
        (torch.ones(16, 4, dtype=torch.bfloat16).t(), False),
        (torch.ones(1, 16, dtype=torch.bfloat16).expand(4, 16), False),
        (torch.ones(0, 16), False),
        (torch.ones(4, 4), True),
        (torch.ones(4, 5), False),
    ],
)
def test_what_tma_can_read(matrix: torch.Tensor, readable: bool) -> None:
    assert tma.tma_can_read(matrix) is readable
    copy = tma.readable(matrix)
    assert (copy is matrix) is readable
    assert torch.equal(copy, matrix)
    assert tma.tma_can_read(copy) or matrix.numel() == 0


HEADS = torch.ones(2, 3, 4, 16, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("matrices", "readable"),
    [
        (HEADS, True),
        (HEADS.transpose(1, 2), True),
        (HEADS[..., :10], True),
        (HEADS[..., 1:], False),
        (HEADS[:, :, :0], False),
        (HEADS.mT, False),
        (HEADS[:, :1].expand(2, 3, 4, 16), False),
        (HEADS.flatten()[:192].as_strided((2, 3, 4, 16), (4, 64, 16, 1)), False),
    ],
)
def test_what_tma_can_read_of_several(matrices: torch.Tensor, readable: bool) -> None:
    assert tma.tma_can_read(matrices) is readable

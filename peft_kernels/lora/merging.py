"""W + sum of scaling B A, as merged weights are made: accumulated in float32, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

# Temporaries are of so many rows.
_ROWS = 1024


class Update(NamedTuple):
    """An adapter's part of a merged weight: scaling * up @ down.

    Attributes:
        up: (N, r).
        down: (r, K).
        scaling: a number.
    """

    up: Tensor
    down: Tensor
    scaling: float


@torch.no_grad()
def write_merged(target: Tensor, weight: Tensor, updates: Sequence[Update]) -> None:
    """Write ``weight + sum of scaling * up @ down`` to target (N, K), which may be weight itself.

    Products and sums are in the widest of float32 and all dtypes of weight and factors, with one rounding to target's.
    """
    wide = accumulated_in(weight, *(factor for update in updates for factor in update[:2]))
    updates = [Update(up.to(wide), down.to(wide), scaling) for up, down, scaling in updates]
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        total = weight[rows].to(wide)
        for up, down, scaling in updates:
            total = torch.addmm(total, up[rows], down, alpha=scaling)
        target[rows].copy_(total)


def accumulated_in(*tensors: Tensor) -> torch.dtype:
    """The widest of float32 and the tensors' dtypes."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)

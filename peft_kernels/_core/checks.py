"""Argument checks whose messages name the tensor, what it must be and what it was.

Every check raises ValueError, never asserts, and is called from a family's ``problem.py`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_tensor(family: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{family}: {name} must be a torch.Tensor, got {type(value).__name__}")


def floating(family: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{family}: {name} must have one of the dtypes {_names(allowed)}, got {tensor.dtype}")


def same_dtype(family: str, name: str, tensor: Tensor, other_name: str, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        choice = " or ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise ValueError(f"{family}: {name} must have the dtype of {other_name} ({choice}), got {tensor.dtype}")


def same_device(family: str, name: str, tensor: Tensor, other_name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{family}: {name} must be on the device of {other_name} ({device}), got {tensor.device}")


def shape(family: str, name: str, tensor: Tensor, symbols: str, expected: Sequence[int]) -> None:
    """``symbols`` is the shape in letters, such as "(r, K)"; ``expected`` is the same shape in numbers."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{family}: {name} must be {symbols} = {_tuple(expected)}, got {_tuple(tensor.shape)}")


def dims(family: str, name: str, tensor: Tensor, symbols: str, ndim: int) -> None:
    if tensor.dim() != ndim:
        raise ValueError(f"{family}: {name} must be {symbols}, got a tensor of shape {_tuple(tensor.shape)}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _tuple(sizes: Sequence[int]) -> str:
    return "(" + ", ".join(str(int(size)) for size in sizes) + ("," if len(sizes) == 1 else "") + ")"

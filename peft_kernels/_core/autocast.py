"""What F.linear does under autocast, for operators that autocast does not know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C import _is_any_autocast_enabled as is_any_autocast

__all__ = ["autocast_dtype", "is_any_autocast", "without_autocast"]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives a matrix product on this device, or None outside autocast."""
    return torch.get_autocast_dtype(device_type) if _is_enabled(device_type) else None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off; entering torch's own costs as much as a small kernel's launch."""
    if _is_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _is_enabled(device_type: str) -> bool:
    """Whether autocast is on; torch raises where asked for a device that knows none, such as meta."""
    # The two devices are named because asking costs more than the answer.
    is_available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return is_available and torch.is_autocast_enabled(device_type)

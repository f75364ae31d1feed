"""What F.linear does under autocast, for operators that autocast does not know."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives a matrix product on this device, or None outside autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off; entering torch's own costs as much as a small kernel's launch."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()

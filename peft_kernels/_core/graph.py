"""Whether a call has to record a graph."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_recorded() -> bool:
    """Whether an eager call must go through its autograd.Function, whose apply costs more than a small kernel's launch.

    It must while gradients are enabled, and inside a level of forward-mode differentiation, whose tangents a direct
    launch would drop where the function refuses them.
    """
    return torch.is_grad_enabled() or forward_ad._current_level >= 0

"""A gain on a linear layer by torch's differentiable operations, for torch.func, tracers and dispatch modes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from peft_kernels.lora.gain_alone.problem import Inputs, LoraGainAloneProblem


def composite(problem: LoraGainAloneProblem, call: Inputs) -> Tensor:
    """Return y (..., N)."""
    return (F.linear(call.x, call.weight, call.bias) * call.gain).to(problem.dtype)

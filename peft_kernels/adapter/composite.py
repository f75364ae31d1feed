"""The bottleneck adapter by torch's differentiable operations, for torch.func, tracers and dispatch modes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.problem import BottleneckAdapterProblem, Inputs


def composite(problem: BottleneckAdapterProblem, call: Inputs) -> Tensor:
    """Return y (..., N); nothing is written in place."""
    z = F.linear(call.x.to(problem.adapter_dtype), call.down_weight, call.down_bias)
    h = ACTIVATIONS[problem.activation].value(z)
    scale = call.scale.detach() if isinstance(call.scale, Tensor) else call.scale
    branch = F.linear(h, call.up_weight, call.up_bias) * scale
    residual = call.x if problem.serial else call.residual
    return (branch if residual is None else residual + branch).to(problem.out_dtype)

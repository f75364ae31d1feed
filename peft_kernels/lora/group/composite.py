"""LoRA group by torch's differentiable operations, for torch.func, tracers, dispatch modes and tensor subclasses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.lora.group.problem import Inputs, LoraGroupProblem
from peft_kernels.lora.kernels import dropout


def composite(problem: LoraGroupProblem, call: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (..., N_j) of each member."""
    ys = [F.linear(call.x, weight, bias) for weight, bias in zip(call.weights, call.biases, strict=True)]
    for index, member in enumerate(problem.members):
        x, scale, limit = call.x.to(problem.adapter_dtypes[index]), call.scales[index], problem.thresholds[index]
        if limit > 0:
            assert call.seed is not None
            keep = dropout.keep_mask(call.seed, problem.m, problem.k, limit, problem.lanes[index])
            x = torch.where(keep.reshape(x.shape), x * dropout.keep_scale(limit), 0.0)
        scale = scale.detach() if isinstance(scale, Tensor) else scale
        update = F.linear(F.linear(x, call.lora_a[index]), call.lora_b[index]) * scale
        ys[member] = ys[member] + update.to(problem.dtype)
    return tuple(ys)

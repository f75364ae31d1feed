"""LoRA linear with a gain by torch's differentiable operations, for torch.func, tracers and dispatch modes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.lora.gain.problem import Inputs, LoraGainProblem
from peft_kernels.lora.kernels import dropout


def composite(problem: LoraGainProblem, call: Inputs) -> Tensor:
    """Return y (..., N)."""
    x = call.x.to(problem.adapter_dtype)
    if call.seed is not None:
        keep = dropout.keep_mask(call.seed, problem.m, problem.k, problem.dropout_threshold)
        x = torch.where(keep.reshape(x.shape), x * problem.keep_scale, 0.0)
    scale = call.scale.detach() if isinstance(call.scale, Tensor) else call.scale
    update = F.linear(F.linear(x, call.lora_a), call.lora_b) * scale
    y = (F.linear(call.x, call.weight) + update) * call.gain
    return (y if call.bias is None else y + call.bias).to(problem.dtype)

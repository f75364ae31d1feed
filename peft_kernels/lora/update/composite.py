"""LoRA update by torch's differentiable operations, for torch.func, tracers and dispatch modes: nothing in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.update.problem import Inputs, LoraUpdateProblem


def composite(problem: LoraUpdateProblem, call: Inputs) -> Tensor:
    """Return y (..., N) and its update."""
    x = call.x.to(problem.adapter_dtype)
    if call.seed is not None:
        keep = dropout.keep_mask(call.seed, problem.m, problem.k, problem.dropout_threshold)
        x = torch.where(keep.reshape(x.shape), x * dropout.keep_scale(problem.dropout_threshold), 0.0)
    scale = call.scale.detach() if isinstance(call.scale, Tensor) else call.scale
    update = F.linear(F.linear(x, call.lora_a), call.lora_b) * scale
    return call.y + update.to(problem.y_dtype)

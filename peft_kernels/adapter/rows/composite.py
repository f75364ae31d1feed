"""Adapters by row by torch's differentiable operations, for torch.func, tracers, dispatch modes and tensor subclasses.

Nothing is read by the host, so every slot takes all rows, of which those of others are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.rows.problem import FIRST, RANK, AdapterRowsProblem, Inputs


def composite(problem: AdapterRowsProblem, call: Inputs) -> Tensor:
    """Return y (..., N); nothing is written in place."""
    residual = call.x if problem.serial else call.residual
    if residual is None:
        residual = call.x.new_zeros((*call.x.shape[:-1], problem.n))
    x, y = call.x.to(problem.adapter_dtype), residual.clone()
    slot = call.slot.reshape(*call.x.shape[:-1], 1)
    rank = torch.arange(problem.r, device=problem.device)
    for t in range(problem.slots):
        # Selected twice: neither the values nor the gradients of others' rows meet this slot's weights.
        mine, first, end = slot == t, call.table[FIRST, t], call.table[FIRST, t] + call.table[RANK, t]
        is_mine = (rank >= first) & (rank < end) & mine.any()
        down = torch.where(is_mine.unsqueeze(1), call.down_weight, 0.0)
        bias = None if call.down_bias is None else torch.where(is_mine, call.down_bias, 0.0)
        h = ACTIVATIONS[problem.activation].value(F.linear(torch.where(mine, x, 0.0), down, bias))
        up_bias = None if call.up_bias is None else call.up_bias[t]
        branch = F.linear(h, torch.where(is_mine, call.up_weight, 0.0), up_bias) * call.scales[t].detach()
        total = (residual + branch).to(problem.out_dtype)
        y = torch.where(mine & (call.table[RANK, t] > 0), total, y)
    return y

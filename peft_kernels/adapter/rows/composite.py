"""Adapters by row by torch's differentiable operations, for torch.func, tracers, dispatch modes and tensor subclasses.

No row is read by the host, so every slot takes all rows, of which those of others are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.slots import firsts_of
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.rows.problem import AdapterRowsProblem, Inputs


def composite(problem: AdapterRowsProblem, call: Inputs) -> Tensor:
    """Return y (..., N); nothing is written in place."""
    residual = call.x if problem.serial else call.residual
    if residual is None:
        residual = call.x.new_zeros((*call.x.shape[:-1], problem.n))
    x, y = call.x.to(problem.adapter_dtype), residual.clone()
    slot = call.slot.reshape(*call.x.shape[:-1], 1)
    for t, (first, rank) in enumerate(zip(firsts_of(problem.ranks), problem.ranks, strict=True)):
        if rank == 0:
            continue
        # Selected twice: neither the values nor the gradients of others' rows meet this slot's weights, nor do zeros.
        mine, ranks = slot == t, slice(first, first + rank)
        down = torch.where(mine.any(), call.down_weight[ranks], 0.0)
        up = torch.where(mine.any(), call.up_weight[:, ranks], 0.0)
        down_bias = None if call.down_bias is None else call.down_bias[ranks]
        h = ACTIVATIONS[problem.activation].value(F.linear(torch.where(mine, x, 0.0), down, down_bias))
        branch = F.linear(h, up, None if call.up_bias is None else call.up_bias[t]) * call.scales[t].detach()
        y = torch.where(mine, (residual + branch).to(problem.out_dtype), y)
    return y

"""LoRA by rows by torch's differentiable operations, for torch.func, tracers, dispatch modes and tensor subclasses.

Nothing is read by the host, so every slot takes all rows, of which those of others are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.rows.problem import FIRST, RANK, THRESHOLD, Inputs, LoraRowsProblem


def composite(problem: LoraRowsProblem, call: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (..., N_j) of each member."""
    ys = [F.linear(call.x, weight, bias) for weight, bias in zip(call.weights, call.biases, strict=True)]
    slot = call.slot.reshape(*call.x.shape[:-1], 1)
    for index, member in enumerate(problem.members):
        x, table = call.x.to(problem.adapter_dtypes[index]), call.tables[index]
        if problem.has_dropout and problem.m:
            x = _dropped(problem, call, index, x)
        rank = torch.arange(problem.r[index], device=problem.device)
        for t in range(problem.slots):
            # Selected twice: neither the values nor the gradients of others' rows meet this slot's factors.
            mine, first = slot == t, table[FIRST, t]
            is_mine = (rank >= first) & (rank < first + table[RANK, t])
            a = torch.where(is_mine.unsqueeze(1), call.lora_a[index], 0.0)
            b = torch.where(is_mine, call.lora_b[index], 0.0)
            update = F.linear(F.linear(torch.where(mine, x, 0.0), a), b) * call.scales[index][t].detach()
            ys[member] = ys[member] + torch.where(mine, update, 0.0).to(problem.dtype)
    return tuple(ys)


def _dropped(problem: LoraRowsProblem, call: Inputs, index: int, x: Tensor) -> Tensor:
    """Each row under its slot's threshold; those without one are in no update."""
    assert call.seed is not None
    of_row = call.tables[index][THRESHOLD][call.slot.clamp(0, problem.slots - 1).long()].unsqueeze(1)
    keep = dropout.keep_mask(call.seed, problem.m, problem.k, of_row, problem.lanes[index])
    factor = (dropout.LEVELS / (dropout.LEVELS - of_row)).to(x.dtype).reshape(*x.shape[:-1], 1)
    return torch.where(keep.reshape(x.shape), x * factor, 0.0)

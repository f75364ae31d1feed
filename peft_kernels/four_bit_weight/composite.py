"""4-bit weights by torch's own operations, for torch.func, tracers and dispatch modes."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.four_bit_weight.kernels.formats import scale_values
from peft_kernels.four_bit_weight.problem import DequantizeProblem, Inputs


@torch.no_grad()
def composite(problem: DequantizeProblem, call: Inputs) -> Tensor:
    """Return W in the call's shape and dtype; nothing is written in place."""
    packed = call.packed.reshape(-1)
    low, high = packed & 15, packed >> 4
    codes = torch.stack((low, high) if problem.format.low_first else (high, low), -1).reshape(-1)[: problem.n]
    values = _table(problem.format.values, problem)[codes.int()]
    w = values * _each(_scales(problem, call), problem.block_size, problem.n)
    return w.to(problem.dtype).reshape(call.shape)


def _scales(problem: DequantizeProblem, call: Inputs) -> Tensor:
    scales, wide = call.scales.reshape(-1), problem.wide_dtype
    if call.code is not None and call.nested_scales is not None:
        second = _each(call.nested_scales.reshape(-1).to(wide), problem.nested_block_size, scales.shape[0])
        return call.code.reshape(-1).to(wide)[scales.int()] * second + call.offset
    if problem.format.scale == "float32":
        return scales.to(wide)
    decoded = _table(scale_values(problem.format.scale), problem)[scales.int()]
    return decoded * call.global_scale if problem.format.scale == "e4m3" else decoded


def _table(values: tuple[float, ...], problem: DequantizeProblem) -> Tensor:
    return torch.tensor(values, dtype=problem.wide_dtype, device=problem.device)


def _each(scales: Tensor, size: int, count: int) -> Tensor:
    """Each scale for all of its block, the last of which may be shorter."""
    return scales[:, None].expand(-1, size).reshape(-1)[:count]

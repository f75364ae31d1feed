"""4-bit weights with torch alone, in pieces that lie in a cache: a byte is looked up as its pair of values.

Equation  W[i] = table[nibble i] * scale[i // block], in float32, rounded once to W's dtype
Tensors   packed, scales and what they are made of: any strides, copied first if not contiguous; W contiguous
Memory    beside W an index and two values for each byte of a piece, 6 bytes an element; pieces are whole blocks
Refused   nothing
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.four_bit_weight.kernels.formats import FORMATS
from peft_kernels.four_bit_weight.problem import DequantizeProblem, Inputs

PIECE = 1 << 17
"""Elements that are decoded at a time, at least; a block that is longer is a piece."""


@torch.no_grad()
def forward(problem: DequantizeProblem, inputs: Inputs) -> Tensor:
    """Return W in the call's shape and dtype."""
    w = torch.empty(inputs.shape, dtype=problem.dtype, device=problem.device)
    packed, flat, pairs = inputs.packed.reshape(-1), w.view(-1), _pairs(problem)
    step = max(problem.block_size, PIECE // problem.block_size * problem.block_size)
    for first in range(0, problem.n, step):
        last = min(first + step, problem.n)
        values = pairs.index_select(0, packed[first // 2 : (last + 1) // 2].int()).view(problem.wide_dtype)
        _write_scaled(problem, inputs, first, values, flat[first:last])
        # Before the next piece has its own.
        del values
    return w


def _write_scaled(problem: DequantizeProblem, inputs: Inputs, first: int, values: Tensor, out: Tensor) -> None:
    """Write values from the element ``first`` on, which begins a block, times their scales; values are changed."""
    block, count = problem.block_size, len(out)
    scale, whole = _scales(problem, inputs, first // block, -(-count // block)), count // block
    if out.dtype == values.dtype and whole == len(scale):
        torch.mul(values.view(whole, block), scale[:, None], out=out.view(whole, block))
        return
    values[: whole * block].view(whole, block).mul_(scale[:whole, None])
    if whole < len(scale):
        values[whole * block :].mul_(scale[whole])
    out.copy_(values[:count])


def _pairs(problem: DequantizeProblem) -> Tensor:
    """The two values of each byte as one complex number, (256,): one lookup, which takes a third of a row's time."""
    if problem.device.type == "cpu":
        return _pairs_on_cpu(problem.kind, problem.wide_dtype)
    # A copy from the host could not be captured in a CUDA graph.
    table = torch.empty(16, dtype=problem.wide_dtype, device=problem.device)
    for code, value in enumerate(problem.format.values):
        table[code].fill_(value)
    return _pairs_of(table, problem.format.low_first)


@cache
def _pairs_on_cpu(kind: str, dtype: torch.dtype) -> Tensor:
    """Made once: for a small weight it would be a third of the time."""
    return _pairs_of(torch.tensor(FORMATS[kind].values, dtype=dtype, device="cpu"), FORMATS[kind].low_first)


def _pairs_of(table: Tensor, low_first: bool) -> Tensor:
    low, high = table.repeat(16), table.repeat_interleave(16)
    return torch.complex(low, high) if low_first else torch.complex(high, low)


def _scales(problem: DequantizeProblem, inputs: Inputs, first: int, count: int) -> Tensor:
    """Of ``count`` blocks from ``first`` on, in the wide dtype."""
    wide, scales = problem.wide_dtype, inputs.scales.reshape(-1)[first : first + count]
    if inputs.code is not None and inputs.nested_scales is not None:
        size = problem.nested_block_size
        second = inputs.nested_scales.reshape(-1)[first // size : -(-(first + count) // size)].to(wide)
        second = second.repeat_interleave(size)[first % size :][:count]
        # Two roundings, as where product and sum are operations of their own.
        return inputs.code.reshape(-1).to(wide).index_select(0, scales.int()).mul_(second).add_(inputs.offset)
    if problem.format.scale == "e8m0":
        return _e8m0(scales).to(wide)
    if problem.format.scale == "e4m3":
        return scales.view(torch.float8_e4m3fn).to(wide).mul_(inputs.global_scale)
    return scales.to(wide)


def _e8m0(scales: Tensor) -> Tensor:
    """A float32's exponent bits; 0 is below its normal values, and 255 is nan, not infinity."""
    codes = scales.int()
    bits = (codes << 23).masked_fill_(codes == 0, 1 << 22).masked_fill_(codes == 255, 0x7FC00000)
    return bits.view(torch.float32)


IMPLEMENTATION = Implementation("torch", forward)

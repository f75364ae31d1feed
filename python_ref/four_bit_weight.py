"""4-bit weights: the four formats one element at a time, and what eager torch makes of them.

    W[i] = table[nibble i] * scale[i // block]               i in the flattened weight
    scale of nested statistics = code[scales[b]] * nested_scales[b // nested_block] + offset

NF4 is QLoRA's NormalFloat (Dettmers et al. 2023, arXiv:2305.14314), in the values of bitsandbytes; FP4 is bitsandbytes'
own; MXFP4 and NVFP4 share E2M1. Scales of MXFP4 are E8M0 bytes, 2^(e - 127), and nan where e = 255; those of NVFP4 are
E4M3 bytes times one number for the tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def _float32(value: float) -> float:
    """The nearest float32 value."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


# Quantiles of a normal distribution, with an exact zero; bitsandbytes computed them in float32.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Magnitudes over the largest of them, 12; minus zero is zero.
_FP4 = [_float32(value / 12) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
FP4 = (*_FP4, 0.0, *(-value for value in _FP4[1:]))


def e2m1(code: int) -> float:
    """One sign, two exponent and one mantissa bit, bias 1."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(magnitude, -1.0 if sign else 1.0)


def e4m3(code: int) -> float:
    """One sign, four exponent and three mantissa bits, bias 7; no infinity, and nan where all but the sign are set."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return math.copysign(magnitude, -1.0 if sign else 1.0)


def e8m0(code: int) -> float:
    """Eight exponent bits, bias 127."""
    return math.nan if code == 255 else 2.0 ** (code - 127)


TABLES = {"nf4": NF4, "fp4": FP4, "mxfp4": tuple(map(e2m1, range(16))), "nvfp4": tuple(map(e2m1, range(16)))}
LOW_NIBBLE_FIRST = {"nf4": False, "fp4": False, "mxfp4": True, "nvfp4": True}


class Nested(NamedTuple):
    """The second level of scales: uint8 codes of the first are looked up, scaled by block, and moved by an offset."""

    code: Sequence[float]
    scales: Sequence[float]
    block: int
    offset: float


def dequantize(
    packed: Sequence[int],
    kind: str,
    elements: int,
    scales: Sequence[float],
    block: int,
    nested: Nested | None = None,
    global_scale: float = 1.0,
) -> list[float]:
    """Return the flattened weight in float64; ``scales`` are numbers, or codes as the format has them."""
    weight = []
    for i in range(elements):
        is_low = (i % 2 == 0) == LOW_NIBBLE_FIRST[kind]
        nibble = packed[i // 2] & 15 if is_low else packed[i // 2] >> 4
        b = i // block
        if nested is not None:
            scale = nested.code[int(scales[b])] * nested.scales[b // nested.block] + nested.offset
        elif kind == "mxfp4":
            scale = e8m0(int(scales[b]))
        elif kind == "nvfp4":
            scale = e4m3(int(scales[b])) * global_scale
        else:
            scale = scales[b]
        weight.append(TABLES[kind][nibble] * scale)
    return weight


def eager(
    packed: Tensor,
    kind: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    scales: Tensor,
    block: int,
    nested: tuple[Tensor, Tensor, int, float | Tensor] | None = None,
    global_scale: float | Tensor = 1.0,
) -> Tensor:
    """What torch computes with a tensor of indices: the scales in float32, the product too, one rounding to dtype."""
    elements, bytes_ = math.prod(shape), packed.reshape(-1).long()
    low, high = bytes_ & 15, bytes_ >> 4
    pairs = (low, high) if LOW_NIBBLE_FIRST[kind] else (high, low)
    values = torch.tensor(TABLES[kind], device=packed.device)[torch.stack(pairs, -1).reshape(-1)[:elements]]
    scale = scales.reshape(-1)
    if nested is not None:
        code, second, second_block, offset = nested
        scale = code[scale.long()] * second.repeat_interleave(second_block)[: len(scale)] + offset
    elif kind == "mxfp4":
        scale = torch.tensor([e8m0(each) for each in range(256)], device=packed.device)[scale.long()]
    elif kind == "nvfp4":
        scale = torch.tensor([e4m3(each) for each in range(256)], device=packed.device)[scale.long()] * global_scale
    return (values * scale.repeat_interleave(block)[:elements]).to(dtype).reshape(tuple(shape))

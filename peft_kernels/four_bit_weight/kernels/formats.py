"""The four formats as data: sixteen values, the order of a byte's nibbles, the block, and what a scale is.

Values of NF4 and FP4 are those of bitsandbytes 0.50.2 (``get_4bit_type`` and its CPU code, bit for bit); E2M1 is the
element of MXFP4 and NVFP4. Each value is a float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Format(NamedTuple):
    """One format.

    Attributes:
        values: of the nibbles 0 to 15.
        low_first: whether the low nibble of a byte is the first of its two elements.
        block_size: elements of a scale, by default.
        is_fixed: whether there is no other block size, and blocks divide the weight's last dimension.
        scale: what the scales are: "float32", "e8m0" or "e4m3".
    """

    values: tuple[float, ...]
    low_first: bool
    block_size: int
    is_fixed: bool
    scale: str


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

FORMATS = {
    "nf4": Format(NF4, low_first=False, block_size=64, is_fixed=False, scale="float32"),
    "fp4": Format(FP4, low_first=False, block_size=64, is_fixed=False, scale="float32"),
    "mxfp4": Format(E2M1, low_first=True, block_size=32, is_fixed=True, scale="e8m0"),
    "nvfp4": Format(E2M1, low_first=True, block_size=16, is_fixed=True, scale="e4m3"),
}


def scale_values(scale: str) -> tuple[float, ...]:
    """Values of the bytes 0 to 255 as scales."""
    return tuple(map(_e8m0 if scale == "e8m0" else _e4m3, range(256)))


def _e8m0(byte: int) -> float:
    return math.nan if byte == 255 else math.ldexp(1.0, byte - 127)


def _e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)
    return -magnitude if byte & 128 else magnitude

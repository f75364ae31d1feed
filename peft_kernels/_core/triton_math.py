"""Device functions that kernels of several families share. Import it only from a family's triton_* files."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_scalar(value, IS_TENSOR: tl.constexpr):
    """A run-time scalar that the host knows as a float, or that lives in a 0-d tensor."""
    if IS_TENSOR:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, where one operand may be float32 and the other half precision.

    EXACT keeps the float32 operand's 24 bits, as eager torch does when it casts the other operand to float32, and
    still multiplies on the half-precision tensor cores: three bfloat16 pieces hold a float32. float16 pieces would
    leave its exponent range, so there the exact product takes three TF32 passes; a float16 fits TF32 exactly.
    Without EXACT the float32 operand is rounded to the other's dtype.
    """
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    elif a.dtype == tl.float32:
        if not EXACT:
            return tl.dot(a.to(b.dtype), b, acc)
        elif b.dtype == tl.bfloat16:
            high, middle, low = _bfloat16_pieces(a)
            acc = tl.dot(low, b, acc)
            acc = tl.dot(middle, b, acc)
            return tl.dot(high, b, acc)
        else:
            return tl.dot(a, b.to(tl.float32), acc, input_precision="tf32x3")
    else:
        if not EXACT:
            return tl.dot(a, b.to(a.dtype), acc)
        elif a.dtype == tl.bfloat16:
            high, middle, low = _bfloat16_pieces(b)
            acc = tl.dot(a, low, acc)
            acc = tl.dot(a, middle, acc)
            return tl.dot(a, high, acc)
        else:
            return tl.dot(a.to(tl.float32), b, acc, input_precision="tf32x3")


@triton.jit
def _bfloat16_pieces(value):
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile in an order that walks GROUP_M tile rows together, so that both operands stay in L2."""
    group = index // (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    inside = index % (GROUP_M * tiles_n)
    return group * GROUP_M + inside % rows, inside // rows

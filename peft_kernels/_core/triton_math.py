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
def split_range(index, size, blocks, BLOCK: tl.constexpr):
    """Start and end of a range of ``blocks`` whole blocks, one of those that share out a reduction over ``size``."""
    span = blocks * BLOCK
    first = index * span
    return first, min(first + span, size)


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, where one operand may be float32 and the other half precision.

    EXACT keeps the float32 operand's 24 bits, as eager torch does when it casts the other operand to float32, and
    still multiplies on the tensor cores: three bfloat16 pieces of 8 bits hold a float32. float16 pieces would leave
    their exponent range, so beside float16 the pieces are TF32, which holds a float16 exactly.
    Without EXACT the float32 operand is rounded to the other's dtype.
    """
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    elif a.dtype == tl.float32:
        if not EXACT:
            return tl.dot(a.to(b.dtype), b, acc)
        high, middle, low = split_float32(a, b.dtype)
        other = b if b.dtype == tl.bfloat16 else b.to(tl.float32)
        acc = tl.dot(low, other, acc, input_precision="tf32")
        acc = tl.dot(middle, other, acc, input_precision="tf32")
        return tl.dot(high, other, acc, input_precision="tf32")
    else:
        if not EXACT:
            return tl.dot(a, b.to(a.dtype), acc)
        high, middle, low = split_float32(b, a.dtype)
        other = a if a.dtype == tl.bfloat16 else a.to(tl.float32)
        acc = tl.dot(other, low, acc, input_precision="tf32")
        acc = tl.dot(other, middle, acc, input_precision="tf32")
        return tl.dot(other, high, acc, input_precision="tf32")


@triton.jit
def split_float32(value, OTHER: tl.constexpr):
    """Three addends of a float32 value, the largest first, each with few enough bits to multiply with dtype OTHER."""
    high = _leading_bits(value, OTHER)
    rest = value - high.to(tl.float32)
    middle = _leading_bits(rest, OTHER)
    return high, middle, _leading_bits(rest - middle.to(tl.float32), OTHER)


@triton.jit
def _leading_bits(value, OTHER: tl.constexpr):
    if OTHER == tl.bfloat16:
        return value.to(tl.bfloat16)
    else:
        # TF32 has 10 stored bits of mantissa; cutting the other 13 here leaves the hardware nothing to round.
        return (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def nearest_tf32(value):
    """Round a float32 value to TF32's 10 stored bits of mantissa, halves away from zero; inf and nan stay."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -8192).to(tl.float32, bitcast=True)
    # The carry would turn a nan with all bits set into zero.
    return tl.where(value == value, rounded, value)

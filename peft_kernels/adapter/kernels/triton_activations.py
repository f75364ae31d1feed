"""The activations of a bottleneck and their derivatives in a kernel's registers; names as in activations.py.

Values are float32. exp is the only transcendental besides erf: tanh is made of it where it is accurate, of its series
elsewhere, because Triton's portable functions have no tanh.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.adapter.kernels.activations import LEAKY_SLOPE

_LEAKY_SLOPE = tl.constexpr(LEAKY_SLOPE)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """h = act(z)."""
    if NAME == "relu":
        return tl.where(z < 0.0, 0.0, z)
    elif NAME == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return 0.5 * z * (1.0 + _tanh(_gelu_argument(z)))
    elif NAME == "silu":
        return z / (1.0 + tl.exp(-z))
    elif NAME == "tanh":
        return _tanh(z)
    elif NAME == "sigmoid":
        return _sigmoid(z)
    elif NAME == "leaky_relu":
        return tl.where(z > 0.0, z, _LEAKY_SLOPE * z)
    else:
        tl.static_assert(NAME == "identity", "no activation of this name")
        return z


@triton.jit
def activation_grad(z, NAME: tl.constexpr):
    """act'(z), at a kink the left one."""
    if NAME == "relu":
        return tl.where(z <= 0.0, 0.0, 1.0)
    elif NAME == "gelu":
        pdf = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * pdf
    elif NAME == "gelu_tanh":
        t = _tanh(_gelu_argument(z))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * z * z)
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    elif NAME == "silu":
        s = _sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif NAME == "tanh":
        t = _tanh(z)
        return 1.0 - t * t
    elif NAME == "sigmoid":
        s = _sigmoid(z)
        return s * (1.0 - s)
    elif NAME == "leaky_relu":
        return tl.where(z > 0.0, 1.0, _LEAKY_SLOPE)
    else:
        tl.static_assert(NAME == "identity", "no activation of this name")
        return tl.zeros_like(z) + 1.0


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _gelu_argument(z):
    return 0.7978845608028654 * (z + 0.044715 * z * z * z)


@triton.jit
def _tanh(z):
    """(1 - e) / (1 + e) with e = exp(-2 |z|) loses its leading bits near zero; six terms of the series do not."""
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    q = z * z
    near = 1.0 + q * (
        -0.3333333333333333
        + q * (0.13333333333333333 + q * (-0.05396825396825397 + q * (0.021869488536155203 - q * 0.008863235529902197)))
    )
    return tl.where(tl.abs(z) < 0.3, z * near, tl.where(z < 0.0, -far, far))

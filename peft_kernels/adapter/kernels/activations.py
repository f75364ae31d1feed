"""The activations of a bottleneck, by name: what every backend, and the oracle beside them, must know.

A derivative at a kink is torch's: the left one. gelu is the one with erf, leaky_relu has torch's default slope. Another
activation is one more entry here, in triton_activations.py, in csrc/adapter/activations.h and in python_ref/adapter.py;
tests compare the four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class Activation:
    """One activation in torch.

    Attributes:
        value: z -> h.
        backward: (dh, z, h) -> dz = dh * act'(z), in one pass.
    """

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


_aten = torch.ops.aten

ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda dh, z, h: _aten.threshold_backward(dh, z, 0)),
    "gelu": Activation(F.gelu, lambda dh, z, h: _aten.gelu_backward(dh, z)),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"), lambda dh, z, h: _aten.gelu_backward(dh, z, approximate="tanh")
    ),
    "silu": Activation(F.silu, lambda dh, z, h: _aten.silu_backward(dh, z)),
    "tanh": Activation(torch.tanh, lambda dh, z, h: _aten.tanh_backward(dh, h)),
    "sigmoid": Activation(torch.sigmoid, lambda dh, z, h: _aten.sigmoid_backward(dh, h)),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu(z, LEAKY_SLOPE),
        lambda dh, z, h: _aten.leaky_relu_backward(dh, z, LEAKY_SLOPE, False),
    ),
    "identity": Activation(lambda z: z, lambda dh, z, h: dh),
}

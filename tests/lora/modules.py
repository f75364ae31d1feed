"""A FusedLoRALinear that does something, and what it computes."""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import FusedLoRALinear

K, N = 24, 20


def lora_layer(seed: int = 0, **options: object) -> FusedLoRALinear:
    """A layer whose adapter does something: B is not zero."""
    torch.manual_seed(seed)
    layer = FusedLoRALinear(K, N, r=4, **options)
    with torch.no_grad():
        for parameter in layer.lora_B.values():
            parameter.normal_()
    return layer


def expected(layer: FusedLoRALinear, x: Tensor) -> Tensor:
    """The layer's equation in float64, with the active adapter and no dropout."""
    y = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    name = layer.active_adapter
    if name is not None:
        update = x.double() @ layer.lora_A[name].double().t() @ layer.lora_B[name].double().t()
        y = y + layer.scaling[name] * update
    return y


def saved_and_loaded(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)

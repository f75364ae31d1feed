"""Bottleneck adapters on every block of the encoder: this package's, and the same in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import ParallelAdapter, SerialAdapter, insert_adapters

BOTTLENECK = 32
# Smooth: at relu's kink a rounding switches a whole gradient, and two curves that are both right part.
ACTIVATION = "gelu"
SUBLAYERS = ("attention", "feed_forward")


class TorchSerialAdapter(SerialAdapter):
    """The serial adapter, op by op."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.up(F.gelu(self.down(x)))


class TorchParallelAdapter(ParallelAdapter):
    """The parallel adapter, op by op."""

    def forward(self, x: Tensor, sublayer_output: Tensor) -> Tensor:
        return sublayer_output + self.scale * self.up(F.gelu(self.down(x)))


def put(encoder: nn.Module, kind: type[SerialAdapter] | type[ParallelAdapter]) -> nn.Module:
    """Freeze the encoder, and give each of its blocks an adapter at the attention and one at the feed-forward layer."""
    encoder.requires_grad_(False)
    weight = next(encoder.parameters())
    for block in encoder.encoder.layer:
        adapters = {
            name: kind(encoder.config.hidden_size, BOTTLENECK, ACTIVATION, device=weight.device, dtype=weight.dtype)
            for name in SUBLAYERS
        }
        insert_adapters(block, adapters)
    return encoder


@torch.no_grad()
def copy_start(fused: nn.Module, unfused: nn.Module) -> None:
    """Give the second encoder's adapters the values of the first's; their names are the same."""
    values = {name: parameter for name, parameter in fused.named_parameters() if parameter.requires_grad}
    for name, parameter in unfused.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(values.pop(name))
    if values:
        raise ValueError(f"adapters: fused and unfused encoders differ: {sorted(values)}")

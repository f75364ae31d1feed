"""What the tests of the adapter modules and of their insertion share."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

import peft_kernels as pk
from python_ref import adapter as oracle

H, R = 24, 6
KINDS = {"serial": pk.SerialAdapter, "parallel": pk.ParallelAdapter}


def with_random_parameters(adapter: nn.Module) -> nn.Module:
    """The adapter with no parameter left at zero."""
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter


def equation(adapter: nn.Module, x: Tensor, beside: Tensor) -> Tensor:
    """What an adapter computes, in the oracle's plain terms."""
    value = oracle.ACTIVATIONS[adapter.activation].value
    return beside + adapter.scale * adapter.up(value(adapter.down(x)))


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: list[Callable[[nn.Module], nn.Module]] = [
    copy.deepcopy,
    lambda module: pickle.loads(pickle.dumps(module)),
    _saved_and_loaded,
]

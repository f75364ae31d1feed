"""FusedLoRALinear under DDP and FSDP2: two processes with half a batch each give the gradients of one with it all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import FusedLoRALinear
from tests import two_processes

pytestmark = two_processes.MARKS

ROWS, K, N = 16, 16, 12


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(FusedLoRALinear(K, N, r=3), nn.Tanh(), FusedLoRALinear(N, N, r=4, lora_alpha=4))
    with torch.no_grad():
        for layer in _layers(model):
            layer.lora_B["default"].normal_()
    return model


def _batch() -> Tensor:
    return torch.randn(ROWS, K, generator=torch.Generator().manual_seed(1))


def _layers(model: nn.Module) -> list[nn.Module]:
    return [model[0], model[2]]


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(how: str, tmp_path: Path) -> None:
    two_processes.check(two_processes.Training(_model, _batch, _layers), how, tmp_path, parameters=4)

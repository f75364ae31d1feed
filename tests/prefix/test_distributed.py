"""PrefixEncoder under DDP and FSDP2: two processes with half a batch each give the gradients of one with it all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import PrefixEncoder, prefix_attention
from tests import two_processes

pytestmark = two_processes.MARKS

B, S, H, H_KV, D = 4, 6, 4, 2, 8
LAYERS = 2


class _Attention(nn.Module):
    """Layers of attention to a prefix each, and frozen projections between them; two encoders, one with an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(PrefixEncoder(LAYERS, H_KV, D, 3, reparam) for reparam in (None, 5))
        self.projections = nn.ModuleList(nn.Linear(H * D, (H + 2 * H_KV) * D, bias=False) for _ in range(2 * LAYERS))
        self.projections.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        prefixes = [prefix for encoder in self.encoders for prefix in encoder()]
        for projection, prefix in zip(self.projections, prefixes, strict=True):
            heads = projection(x).unflatten(-1, (-1, D)).transpose(1, 2)
            q, k, v = heads.split((H, H_KV, H_KV), dim=1)
            x = x + prefix_attention(q, k, v, *prefix, causal=True).transpose(1, 2).flatten(2)
        return x


def _model() -> nn.Module:
    torch.manual_seed(0)
    return _Attention()


def _batch() -> Tensor:
    return torch.randn(B, S, H * D, generator=torch.Generator().manual_seed(1))


def _layers(model: nn.Module) -> list[nn.Module]:
    return list(model.encoders)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(how: str, tmp_path: Path) -> None:
    """FSDP2 frees an encoder's table after its forward pass: prefixes must not be views of it."""
    two_processes.check(two_processes.Training(_model, _batch, _layers), how, tmp_path, parameters=6)

"""PromptEmbedding and PromptEnsemble under DDP and FSDP2: two processes with half a batch each give the gradients of
one with it all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import PromptEmbedding, PromptEnsemble
from tests import two_processes

pytestmark = two_processes.MARKS

B, L, P, D, N = 4, 5, 3, 8, 3


class _Prompted(nn.Module):
    """A prompt, an ensemble of others before it, a frozen layer, and for each row of tokens all of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = PromptEmbedding(P, D)
        self.ensemble = PromptEnsemble([PromptEmbedding(P, D) for _ in range(N)])
        self.layer = nn.Linear(D, D).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        y = torch.tanh(self.layer(self.ensemble(self.prompt(tokens))))
        return y.unflatten(0, (N, -1)).transpose(0, 1)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return _Prompted()


def _batch() -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))


def _layers(model: nn.Module) -> list[nn.Module]:
    """An ensemble is one layer: it reads its prompts itself, so that theirs would not be gathered."""
    return [model.prompt, model.ensemble]


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes(how: str, tmp_path: Path) -> None:
    two_processes.check(two_processes.Training(_model, _batch, _layers), how, tmp_path, parameters=1 + N)

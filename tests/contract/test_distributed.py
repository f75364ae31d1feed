"""Modules under DDP and FSDP2: two processes with half a batch each give the gradients of one with it all."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import FusedLoRALinear, PrefixEncoder, PromptEmbedding, PromptEnsemble, prefix_attention
from tests import two_processes

pytestmark = [*two_processes.MARKS, pytest.mark.slow]

B, S, H, H_KV, D = 4, 6, 4, 2, 8
WIDTH, P, N = H * D, 3, 3


class _Lora(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(FusedLoRALinear(WIDTH, WIDTH, r=3), nn.Tanh(), FusedLoRALinear(WIDTH, 12, r=4, lora_alpha=4))
        self.sharded = [self[0], self[2]]
        with torch.no_grad():
            for layer in self.sharded:
                layer.lora_B["default"].normal_()


class _Prefixed(nn.Module):
    """Attention to a prefix each, and frozen projections between; two encoders, one with an MLP.

    FSDP2 frees an encoder's table after its forward pass: prefixes must not be views of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(PrefixEncoder(2, H_KV, D, P, reparam) for reparam in (None, 5))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, (H + 2 * H_KV) * D, bias=False) for _ in range(4))
        self.projections.requires_grad_(False)
        self.sharded = list(self.encoders)

    def forward(self, x: Tensor) -> Tensor:
        prefixes = [prefix for encoder in self.encoders for prefix in encoder()]
        for projection, prefix in zip(self.projections, prefixes, strict=True):
            heads = projection(x).unflatten(-1, (-1, D)).transpose(1, 2)
            q, k, v = heads.split((H, H_KV, H_KV), dim=1)
            x = x + prefix_attention(q, k, v, *prefix, causal=True).transpose(1, 2).flatten(2)
        return x


class _Prompted(nn.Module):
    """A prompt, an ensemble of others before it, a frozen layer, and for each row of tokens all of its results.

    An ensemble is one layer: it reads its prompts itself, so that theirs would not be gathered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt = PromptEmbedding(P, WIDTH)
        self.ensemble = PromptEnsemble([PromptEmbedding(P, WIDTH) for _ in range(N)])
        self.layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.sharded = [self.prompt, self.ensemble]

    def forward(self, tokens: Tensor) -> Tensor:
        y = torch.tanh(self.layer(self.ensemble(self.prompt(tokens))))
        return y.unflatten(0, (N, -1)).transpose(0, 1)


MODELS = (_Lora, _Prefixed, _Prompted)
PARAMETERS = 4 + 6 + 1 + N


def _loss(model: nn.Module, rank: int | None) -> Tensor:
    batch = torch.randn(B, S, WIDTH, generator=torch.Generator().manual_seed(1))
    return model(two_processes.share(batch, rank)).square().flatten(1).sum(1).mean()


def _check_all(rank: int) -> int:
    checked = 0
    for how, make in itertools.product(two_processes.HOW, MODELS):
        torch.manual_seed(0)
        whole = make()
        model = copy.deepcopy(whole)
        checked += two_processes.compare(rank, how, make.__name__, model, whole, model.sharded, _loss)
    return checked


def test_two_processes(tmp_path: Path) -> None:
    assert two_processes.run(_check_all, tmp_path) == [2 * PARAMETERS] * two_processes.WORLD

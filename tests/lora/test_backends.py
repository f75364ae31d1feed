"""What the LoRA linear backends owe beside the contract: the mask of a seed."""

from __future__ import annotations

import pytest
import torch

import peft_kernels as pk
from tests.lora.cases import OPERATOR, SEED, VARIANTS, Case, keep_mask

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("name", VARIANTS)
def test_dropout_draws_the_published_mask(name: str, device: torch.device) -> None:
    """With x all ones, one rank and identity-like factors, the output is the mask itself."""
    m, k, p = 48, 24, 0.4
    x, weight = torch.ones(m, k, device=device), torch.zeros(k, k, device=device)
    with OPERATOR.using(name) as backend:
        y = pk.lora_linear(
            x, weight, torch.eye(k, device=device), torch.eye(k, device=device), dropout_p=p, seed=SEED, backend=backend
        )
    mask = keep_mask(Case(m=m, k=k, p=p), device)
    assert torch.equal(y != 0, mask)
    assert torch.equal(y != 0, pk.lora_linear_dropout_mask(SEED, m, k, p, device))

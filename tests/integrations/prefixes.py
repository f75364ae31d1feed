"""Tiny models with prefixes, and what they are compared with: the same prefix in a cache of past keys, PEFT's way."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peft_kernels import PrefixEncoder
from peft_kernels.integrations import transformers as integration
from tests.integrations.models import ARCHITECTURES, tokens

P = 5
# Two orders of the same float32 sums through two layers; logits and gradients here are of the order of one.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

# The models that carry prefixes, and a padding side each.
PADDED = {"none": None, "left": slice(0, 3), "right": slice(4, None)}


def base(architecture: str, seed: int = 0, **config: object) -> nn.Module:
    """A frozen model in evaluation mode, with weights large enough for attention to be far from uniform."""
    model = ARCHITECTURES[architecture][0]()
    changed = copy.deepcopy(model.config)
    for name, value in {"initializer_range": 0.3, **config}.items():
        setattr(changed, name, value)
    torch.manual_seed(seed)
    return type(model)(changed).eval().requires_grad_(False)


def with_prefix(
    architecture: str, reparam_hidden: int | None = None, length: int = P, **config: object
) -> tuple[nn.Module, PrefixEncoder]:
    model = base(architecture, **config)
    encoder = integration.prefix_encoder(model, length, reparam_hidden)
    integration.add_prefix(model, encoder)
    return model, encoder


def padding(side: str) -> Tensor | None:
    """A mask for ``tokens()``, whose second row is padded by one token less."""
    if side == "none":
        return None
    mask = torch.ones_like(tokens())
    mask[0, PADDED[side]] = 0
    mask[1, 0 if side == "left" else -1] = 0
    return mask


def with_cache(model: nn.Module, encoder: PrefixEncoder, ids: Tensor, mask: Tensor | None, **extra: object) -> Tensor:
    """Logits of the plain model behind a cache that holds the prefix in every row."""
    rows = ids.shape[0]
    pairs = [tuple(part[None].expand(rows, -1, -1, -1) for part in pair) for pair in encoder()]
    if mask is not None:
        mask = torch.cat((mask.new_ones(rows, encoder.prefix_length), mask), dim=1)
    backbone = model.base_model
    hidden = backbone(input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(pairs), **extra)[0]
    return model.lm_head(hidden) if hasattr(model, "lm_head") else model.cls(hidden)


def loss_of(logits: Tensor, mask: Tensor | None) -> Tensor:
    """A scalar of the order of one that every real token's logits enter."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    if mask is not None:
        weights = weights * mask[..., None]
    return (logits.float() * weights).mean()


def train_step(model: nn.Module, mask: Tensor | None = None, **extra: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one step on ``tokens()``."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens(), attention_mask=mask, **extra)[0]
    loss_of(logits, mask).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

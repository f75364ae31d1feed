"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): equations, their derivatives by hand, and eager torch.

    y[n B + b] = [prompts[n]; tokens[b]]

prompts (N, P, D), tokens (B, L, D), y (N B, P + L, D): one batch in which every prompt meets every row of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """Gradients of every input of ``forward``."""

    prompts: Tensor
    tokens: Tensor


def forward(prompts: Tensor, tokens: Tensor) -> Tensor:
    """Return y (N B, P + L, D) in the dtype of the arguments."""
    return torch.stack([torch.cat((prompt, row)) for prompt in prompts for row in tokens])


def backward(dy: Tensor, prompts: Tensor, tokens: Tensor) -> Gradients:
    """Return the gradients of sum(dy * y): a prompt's is summed over the batch, a row's over the prompts."""
    apart = dy.unflatten(0, (prompts.shape[0], tokens.shape[0]))
    length = prompts.shape[1]
    return Gradients(prompts=apart[:, :, :length].sum(1), tokens=apart[:, :, length:].sum(0))


def eager(prompts: Tensor, tokens: Tensor) -> Tensor:
    """What PEFT computes for each prompt, repeat and concatenation, joined over the prompts; casts to tokens' dtype."""
    batch = tokens.shape[0]
    return torch.cat([torch.cat((prompt.to(tokens.dtype).expand(batch, -1, -1), tokens), dim=1) for prompt in prompts])

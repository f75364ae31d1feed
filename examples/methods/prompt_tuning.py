"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): PromptEmbedding, and PEFT's prompt tuning beside it."""

from __future__ import annotations

import torch
from torch import nn

from examples import prompts
from examples.methods import Method

# Of 1e-3, 3e-3, 1e-2, 3e-2 and 1e-1 over 163 steps, with one seed, the best accuracy on the validation split.
LEARNING_RATE = 3e-3


def put_fused(encoder: nn.Module) -> nn.Module:
    """Freeze the encoder and put a prompt in front of its texts."""
    encoder.requires_grad_(False)
    return prompts.Prompted(encoder, prompts.draw(encoder))


def put_unfused(encoder: nn.Module) -> nn.Module:
    """Let PEFT do the same."""
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(
        encoder, PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=prompts.NUM_TOKENS)
    )


@torch.no_grad()
def copy_start(fused: nn.Module, unfused: nn.Module) -> None:
    """Give PEFT's prompt the values of the fused one."""
    unfused.prompt_encoder["default"].embedding.weight.copy_(fused.prompts.weight)


METHOD = Method(
    name="prompt tuning",
    settings={"prompt tokens": prompts.NUM_TOKENS, "started as": "tokens drawn at random"},
    learning_rate=LEARNING_RATE,
    unfused=put_unfused,
    unfused_by="PEFT",
    fused=put_fused,
    copy_start=copy_start,
)

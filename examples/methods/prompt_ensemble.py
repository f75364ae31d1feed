"""An ensemble of prompts (Lester et al. 2021, arXiv:2104.08691, section 6): PromptEnsemble, one batch for all of them.

Each prompt has a linear layer of its own and learns from its own loss, as if it were alone; they meet in the vote.
Beside it: a pass, forward and backward, for each prompt.
"""

from __future__ import annotations

import torch
from torch import nn

from examples import prompts
from examples.methods import Method
from examples.methods.prompt_tuning import LEARNING_RATE
from peft_kernels import PromptEnsemble

MEMBERS = 3


def put_fused(encoder: nn.Module) -> nn.Module:
    """Freeze the encoder and put several prompts in front of its texts, which then run as one batch."""
    encoder.requires_grad_(False)
    return prompts.PromptedTogether(encoder, PromptEnsemble([prompts.draw(encoder) for _ in range(MEMBERS)]))


def put_unfused(encoder: nn.Module) -> nn.Module:
    """Freeze the encoder and give it several prompts, which take turns."""
    encoder.requires_grad_(False)
    table = encoder.get_input_embeddings()
    members = [
        prompts.TorchPrompt(prompts.NUM_TOKENS, table.embedding_dim, table.weight.device) for _ in range(MEMBERS)
    ]
    return prompts.PromptedApart(encoder, members)


@torch.no_grad()
def copy_start(fused: nn.Module, unfused: nn.Module) -> None:
    """Give each prompt the values of its fused double."""
    for ours, theirs in zip(fused.prompts.prompts, unfused.passes, strict=True):
        theirs.prompts.weight.copy_(ours.weight)


METHOD = Method(
    name="prompt ensemble",
    settings={"prompts": MEMBERS, "prompt tokens": prompts.NUM_TOKENS, "started as": "tokens drawn at random"},
    # The members learn as if alone, so what is best for one is best for all.
    learning_rate=LEARNING_RATE,
    unfused=put_unfused,
    unfused_by="a pass for each",
    fused=put_fused,
    copy_start=copy_start,
)

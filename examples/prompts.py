"""Prompts in front of an encoder's token embeddings: this package's, and the same in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from peft_kernels import PromptEmbedding, PromptEnsemble

NUM_TOKENS = 4


class Prompted(nn.Module):
    """An encoder whose tokens have prompts in front.

    Positions count from the prompt's first one, as in PEFT: the text begins at position P. Every token sees the prompt.

    Args:
        encoder: a BERT of transformers.
        prompts: maps token embeddings (B, L, width) to (members * B, P + L, width).
    """

    def __init__(self, encoder: nn.Module, prompts: nn.Module) -> None:
        super().__init__()
        self.encoder, self.prompts = encoder, prompts

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """Return the encoder's output, whose hidden states are (members * B, P + L, width)."""
        embeddings = self.prompts(self.encoder.get_input_embeddings()(input_ids))
        rows, positions = embeddings.shape[:2]
        mask = attention_mask.new_ones(rows, positions)
        mask[:, -attention_mask.shape[1] :] = attention_mask.repeat(rows // len(attention_mask), 1)
        return self.encoder(inputs_embeds=embeddings, attention_mask=mask)


class PromptedTogether(Prompted):
    """Several prompts, run as one batch."""

    def __init__(self, encoder: nn.Module, prompts: PromptEnsemble) -> None:
        super().__init__(encoder, prompts)
        self.members = len(prompts.prompts)

    def vote(self, logits: Tensor) -> Tensor:
        return self.prompts.vote(logits)


class TorchPrompt(nn.Module):
    """A prompt, repeated for every text and concatenated with it."""

    def __init__(self, num_tokens: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, width, device=device))

    def forward(self, token_embeddings: Tensor) -> Tensor:
        return torch.cat([self.weight.repeat(len(token_embeddings), 1, 1), token_embeddings], dim=1)


class PromptedApart(nn.Module):
    """Several prompts, each with a pass through the encoder of its own."""

    def __init__(self, encoder: nn.Module, prompts: list[TorchPrompt]) -> None:
        super().__init__()
        self.passes = nn.ModuleList(Prompted(encoder, prompt) for prompt in prompts)
        self.members = len(prompts)

    def vote(self, logits: Tensor) -> Tensor:
        """Choose what most members choose; the number of members is odd, and there are two classes."""
        return logits.unflatten(0, (self.members, -1)).argmax(dim=-1).mode(dim=0).values


def draw(encoder: nn.Module) -> PromptEmbedding:
    """Start a prompt as the embeddings of tokens drawn at random (Lester et al. 2021, section 3.2)."""
    table = encoder.get_input_embeddings()
    return PromptEmbedding(NUM_TOKENS, table.embedding_dim, init_from=table)

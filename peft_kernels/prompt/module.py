"""PromptEmbedding, a trainable prompt, and PromptEnsemble, several of them run as one batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from peft_kernels._core import arguments
from peft_kernels.prompt.op import prompt_tuning


class PromptEmbedding(nn.Module):
    """Hold a trainable prompt and put it in front of token embeddings (Lester et al. 2021, arXiv:2104.08691).

    Semantics: ``y[b] = cat(weight, token_embeddings[b])``

    Args:
        num_tokens: P, the prompt's length, at least 1.
        embedding_dim: D.
        init_from: None draws normal values, as nn.Embedding does; a tensor (P, D) is copied; of an nn.Embedding, rows
            are drawn at random and copied.
        device, dtype: of the prompt; None takes those of ``init_from``, or torch's defaults.

    Raises:
        ValueError: a size is no int or below 1, the dtype is not floating, or ``init_from`` does not fit.

    Example:
        >>> prompt = PromptEmbedding(2, 4)
        >>> prompt(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 7, 4])
    """

    def __init__(
        self,
        num_tokens: int,
        embedding_dim: int,
        init_from: Tensor | nn.Embedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        arguments.integer("PromptEmbedding", "num_tokens", num_tokens, 1)
        arguments.integer("PromptEmbedding", "embedding_dim", embedding_dim, 1)
        arguments.floating("PromptEmbedding", "dtype", dtype)
        self.num_tokens, self.embedding_dim = num_tokens, embedding_dim
        rows = _initial_rows(init_from, num_tokens, embedding_dim)
        if rows is not None:
            device, dtype = device or rows.device, dtype or rows.dtype
        self.weight = nn.Parameter(torch.empty(num_tokens, embedding_dim, device=device, dtype=dtype))
        if rows is None:
            self.reset_parameters()
        else:
            self.weight.data.copy_(rows)

    def reset_parameters(self) -> None:
        """Draw normal values, such as after ``to_empty``; ``init_from`` is not kept."""
        nn.init.normal_(self.weight)

    def forward(self, token_embeddings: Tensor) -> Tensor:
        """Map token_embeddings (B, L, D) to (B, P + L, D)."""
        return prompt_tuning(token_embeddings, self.weight[None])

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, embedding_dim={self.embedding_dim}"


class PromptEnsemble(nn.Module):
    """Run several prompts over the same tokens as one batch, and let them vote.

    Semantics: ``y[n * B + b] = cat(prompts[n].weight, token_embeddings[b])``

    Args:
        prompts: PromptEmbeddings of one length, dimension, dtype and device; at least one.

    Raises:
        ValueError: there is no prompt, or they differ.

    Example:
        >>> ensemble = PromptEnsemble([PromptEmbedding(2, 4), PromptEmbedding(2, 4)])
        >>> ensemble(torch.zeros(3, 5, 4)).shape
        torch.Size([6, 7, 4])
        >>> ensemble.vote(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([0])
    """

    def __init__(self, prompts: Sequence[PromptEmbedding]) -> None:
        super().__init__()
        prompts = list(prompts) if isinstance(prompts, Iterable) else []
        if not prompts or not all(isinstance(prompt, PromptEmbedding) for prompt in prompts):
            raise ValueError("PromptEnsemble: prompts must be PromptEmbeddings, at least one")
        kinds = {
            (prompt.num_tokens, prompt.embedding_dim, prompt.weight.dtype, prompt.weight.device) for prompt in prompts
        }
        if len(kinds) > 1:
            raise ValueError(
                "PromptEnsemble: prompts must have one length, dimension, dtype and device, "
                f"got {sorted(map(str, kinds))}"
            )
        self.prompts = nn.ModuleList(prompts)

    def forward(self, token_embeddings: Tensor) -> Tensor:
        """Map token_embeddings (B, L, D) to (N * B, P + L, D), prompt by prompt."""
        weights = [cast("Tensor", prompt.weight) for prompt in self.prompts]
        return prompt_tuning(token_embeddings, torch.stack(weights))

    def vote(self, logits: Tensor) -> Tensor:
        """Return the class (B,) that most prompts choose; ties go to the higher mean probability, then the lower index.

        Args:
            logits: (N * B, C), floating, in the order of ``forward``.

        Raises:
            ValueError: the shape or dtype is another.
        """
        n = len(self.prompts)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"PromptEnsemble: logits must be a floating torch.Tensor, got {got}")
        if logits.dim() != 2 or logits.shape[0] % n or logits.shape[1] == 0:
            raise ValueError(f"PromptEnsemble: logits must be (N * B, C) with N = {n}, got {tuple(logits.shape)}")
        apart = logits.unflatten(0, (n, logits.shape[0] // n))
        votes = nn.functional.one_hot(apart.argmax(-1), logits.shape[1]).sum(0)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        mean = apart.softmax(-1, dtype=wide).mean(0)
        return mean.masked_fill(votes < votes.amax(-1, keepdim=True), -1.0).argmax(-1)


def _initial_rows(init_from: Tensor | nn.Embedding | None, num_tokens: int, embedding_dim: int) -> Tensor | None:
    if init_from is None:
        return None
    if isinstance(init_from, nn.Embedding):
        table = init_from.weight.detach()
        if table.shape[0] == 0:
            raise ValueError("PromptEmbedding: init_from must have rows to draw from, got an nn.Embedding of none")
        init_from = table[torch.randint(table.shape[0], (num_tokens,), device=table.device)]
    if not isinstance(init_from, Tensor) or tuple(init_from.shape) != (num_tokens, embedding_dim):
        got = tuple(init_from.shape) if isinstance(init_from, Tensor) else type(init_from).__name__
        expected = (num_tokens, embedding_dim)
        raise ValueError(f"PromptEmbedding: init_from must be (P, D) = {expected} or an nn.Embedding of D, got {got}")
    if not init_from.is_floating_point():
        raise ValueError(f"PromptEmbedding: init_from must be floating, got {init_from.dtype}")
    return init_from.detach()

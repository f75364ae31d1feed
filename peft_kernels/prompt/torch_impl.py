"""Prompt tuning with torch alone: two copies into one allocation, and a sum for each gradient.

Forward   y[n, b] = [prompts[n]; tokens[b]]
Backward  dprompts[n] = sum over b of dy[n, b, :P]; dtokens[b] = sum over n of dy[n, b, P:]
Tensors   prompts (N, P, D), tokens (B, L, D), y and dy (N B, P + L, D): any strides
Saved     nothing
Refused   nothing
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.prompt.problem import Gradients, Inputs, Needs, PromptTuningProblem


def forward(problem: PromptTuningProblem, inputs: Inputs) -> Tensor:
    """Return y (N B, P + L, D) in the tokens' dtype."""
    tokens, prompts = inputs
    n, b, p = problem.n, problem.b, problem.p
    y = torch.empty(n, b, p + problem.l, problem.d, dtype=problem.dtype, device=problem.device)
    y[:, :, :p] = prompts[:, None]
    y[:, :, p:] = tokens
    return y.view(n * b, p + problem.l, problem.d)


def backward(problem: PromptTuningProblem, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    apart = dy.unflatten(0, (problem.n, problem.b))
    wide = problem.wide_dtype
    return Gradients(
        prompts=apart[:, :, : problem.p].sum(1, dtype=wide).to(problem.prompt_dtype) if needs.prompts else None,
        token_embeddings=apart[:, :, problem.p :].sum(0, dtype=wide).to(problem.dtype)
        if needs.token_embeddings
        else None,
    )


IMPLEMENTATION = Implementation("torch", forward, backward)

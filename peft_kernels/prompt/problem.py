"""What a prompt tuning call is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks

NAME = "prompt_tuning"

TENSORS = checks.Table(
    NAME,
    "token_embeddings",
    (
        checks.Row("token_embeddings", "B L D"),
        checks.Row("prompts", "N P D", dtype_of="token_embeddings", or_float32=True),
    ),
)


class Inputs(NamedTuple):
    """The arguments of one call.

    Attributes:
        token_embeddings: (B, L, D), any strides.
        prompts: (N, P, D), in the tokens' dtype, or float32 beside half precision.
    """

    token_embeddings: Tensor
    prompts: Tensor


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for."""

    token_embeddings: bool
    prompts: bool


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of the arguments."""

    token_embeddings: Tensor | None
    prompts: Tensor | None


@dataclass(frozen=True)
class PromptTuningProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        n, b: prompts, rows of tokens.
        p, l, d: length of a prompt, tokens of a row, embedding dimension.
        dtype: of the tokens and the result.
        prompt_dtype: dtype, or float32 beside half precision.
        device: of all tensors.
    """

    n: int
    b: int
    p: int
    l: int  # noqa: E741
    d: int
    dtype: torch.dtype
    prompt_dtype: torch.dtype
    device: torch.device

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of sums."""
        return checks.wide_dtype(self.dtype)

    @property
    def is_empty(self) -> bool:
        """Whether the result has no element."""
        return 0 in (self.n, self.b, self.d) or self.p + self.l == 0


def make_problem(call: Inputs) -> PromptTuningProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    tokens, prompts = call
    sizes = TENSORS.check(call)
    return PromptTuningProblem(
        n=sizes["N"],
        b=sizes["B"],
        p=sizes["P"],
        l=sizes["L"],
        d=sizes["D"],
        dtype=tokens.dtype,
        prompt_dtype=prompts.dtype,
        device=tokens.device,
    )

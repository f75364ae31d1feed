"""What a prompt tuning call is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks

FAMILY = "prompt_tuning"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for."""

    prompts: bool
    tokens: bool


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of the arguments."""

    prompts: Tensor | None
    tokens: Tensor | None


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
        """Of sums: never below float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_empty(self) -> bool:
        """Whether the result has no element."""
        return 0 in (self.n, self.b, self.d) or self.p + self.l == 0


def describe(prompts: Tensor, tokens: Tensor) -> PromptTuningProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    checks.is_tensor(FAMILY, "prompts", prompts)
    checks.is_tensor(FAMILY, "tokens", tokens)
    checks.dims(FAMILY, "tokens", tokens, "(B, L, D)", 3)
    checks.dims(FAMILY, "prompts", prompts, "(N, P, D)", 3)
    b, length, d = tokens.shape
    n, p, _ = prompts.shape
    checks.shape(FAMILY, "prompts", prompts, "(N, P, D)", (n, p, d))
    checks.floating(FAMILY, "tokens", tokens, DTYPES)
    masters = torch.float32 if tokens.dtype in _HALF else tokens.dtype
    checks.same_dtype(FAMILY, "prompts", prompts, "tokens, or float32 beside half precision", tokens.dtype, masters)
    checks.same_device(FAMILY, "prompts", prompts, "tokens", tokens.device)
    return PromptTuningProblem(n, b, p, length, d, tokens.dtype, prompts.dtype, tokens.device)

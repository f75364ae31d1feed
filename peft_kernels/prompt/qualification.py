"""The problems by which a machine checks `prompt_tuning`'s kernels, and eager torch beside them.

A part is the dtypes. Its problems have rows below and above the largest block, and an ensemble of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.qualification import PAIRS, Draw, Family, Qualification, double, dtype_name, dtypes_of
from peft_kernels.prompt.problem import NAME, Inputs, PromptTuningProblem


@dataclass(frozen=True)
class Case:
    """One problem."""

    n: int
    b: int
    p: int
    l: int  # noqa: E741
    d: int
    dtype: torch.dtype
    prompt_dtype: torch.dtype

    def __str__(self) -> str:
        return f"n{self.n} b{self.b} p{self.p} l{self.l} d{self.d} {dtype_name(self.dtype, self.prompt_dtype)}"


def _make(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Tensor]:
    draw = Draw(device, seed)
    tokens = draw.normal(case.dtype, case.b, case.l, case.d)
    call = Inputs(tokens, draw.normal(case.prompt_dtype, case.n, case.p, case.d))
    return call, draw.normal(case.dtype, case.n * case.b, case.p + case.l, case.d)


def _eager(call: Inputs) -> Tensor:
    """What PEFT computes for each prompt, repeat and concatenation, joined over the prompts."""
    tokens, prompts = call
    return torch.cat([torch.cat((p.to(tokens.dtype).expand(len(tokens), -1, -1), tokens), dim=1) for p in prompts])


def _exact(call: Inputs) -> Inputs:
    """A float32 prompt is cast to the tokens' dtype first."""
    exact: Inputs = double(call._replace(prompts=call.prompts.to(call.token_embeddings.dtype)))
    return exact


FAMILY = Family(NAME, _make, _eager, _exact)

# No product is computed, so TF32 changes nothing.
_PAIRS = tuple(pair for pair in PAIRS if pair != "tf32")


def _touched(problem: PromptTuningProblem) -> tuple[str, ...]:
    return (dtype_name(problem.dtype, problem.prompt_dtype).replace("tf32", "float32"),)


def _cases(part: str, hardware: Hardware) -> Sequence[Case]:
    dtypes = dtypes_of(part)
    return Case(1, 9, 17, 40, 70, *dtypes), Case(3, 4, 5, 9, 1100, *dtypes)


TRITON = Qualification(FAMILY, _PAIRS, _touched, _cases, quick=("float32", "bfloat16", "float16+float32"))

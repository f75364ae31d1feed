"""Problems, their tensors, and the ways to run them, shared by the tests of the prompt tuning family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.prompt.op import prompt_tuning
from python_ref import prompt as oracle

BACKENDS = ("torch", "triton")


@dataclass(frozen=True)
class Case:
    """One problem; ``strided`` gives both arguments gaps and a last dimension that is not contiguous."""

    n: int = 2
    b: int = 3
    p: int = 4
    l: int = 5  # noqa: E741
    d: int = 24
    dtype: torch.dtype = torch.float32
    prompt_dtype: torch.dtype | None = None
    strided: bool = False

    def __str__(self) -> str:
        names = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.prompt_dtype) if dtype)
        return f"n{self.n}-b{self.b}-p{self.p}-l{self.l}-d{self.d}-{names}{'-strided' * self.strided}"


class Result(NamedTuple):
    """Output and gradients of one run."""

    y: Tensor
    prompts: Tensor
    tokens: Tensor


DTYPES = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)

GRID = (
    *(Case(dtype=dtype, prompt_dtype=prompt) for dtype, prompt in DTYPES),
    Case(n=1, b=20, p=17, l=3, d=70, dtype=torch.bfloat16),
    Case(n=5, b=1, p=1, l=1, d=1),
    Case(n=3, b=2, p=3, l=9, d=1100, dtype=torch.bfloat16, prompt_dtype=torch.float32),
    Case(strided=True),
    Case(b=40, d=8),
    Case(p=0),
    Case(l=0),
)


def make(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw prompts, tokens and an output gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prompts = normal(case.n, case.p, case.d).to(device, case.prompt_dtype or case.dtype)
    tokens = normal(case.b, case.l, case.d).to(device, case.dtype)
    if case.strided:
        prompts, tokens = (torch.stack((x, x), -1)[..., 0].transpose(0, 1) for x in (prompts, tokens))
        prompts, tokens = (x.contiguous().transpose(0, 1) for x in (prompts, tokens))
        tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    return prompts, tokens, normal(case.n * case.b, case.p + case.l, case.d).to(device, case.dtype)


def run_ours(case: Case, prompts: Tensor, tokens: Tensor, dy: Tensor, backend: str) -> Result:
    leaves = [prompts.detach().requires_grad_(), tokens.detach().requires_grad_()]
    y = prompt_tuning(*leaves, backend=backend)
    return Result(y.detach(), *torch.autograd.grad(y, leaves, dy))


def run_eager(case: Case, prompts: Tensor, tokens: Tensor, dy: Tensor) -> Result:
    leaves = [prompts.detach().requires_grad_(), tokens.detach().requires_grad_()]
    y = oracle.eager(*leaves)
    return Result(y.detach(), *torch.autograd.grad(y, leaves, dy))


def run_oracle(case: Case, prompts: Tensor, tokens: Tensor, dy: Tensor) -> Result:
    """In float64, on the same rounded inputs: float32 prompts are cast to the tokens' dtype first."""
    wide = prompts.to(case.dtype).double(), tokens.double()
    return Result(oracle.forward(*wide), *oracle.backward(dy.double(), *wide))

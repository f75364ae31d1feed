"""Problems of the prompt tuning family, and what its operator owes."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels.prompt import op
from python_ref import prompt as oracle
from tests.contract.draw import DTYPES, Draw, dtypes_name
from tests.contract.operators import Operator

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

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.n * self.b, self.p + self.l, self.d

    @property
    def y_dtype(self) -> torch.dtype:
        return self.dtype

    def __str__(self) -> str:
        dtypes = dtypes_name(self.dtype, self.prompt_dtype)
        return f"n{self.n}-b{self.b}-p{self.p}-l{self.l}-d{self.d}-{dtypes}{'-strided' * self.strided}"


class Tensors(NamedTuple):
    token_embeddings: Tensor
    prompts: Tensor


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


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw prompts and tokens."""
    draw = Draw(seed)
    prompts = draw.normal(case.n, case.p, case.d).to(device, case.prompt_dtype or case.dtype)
    tokens = draw.normal(case.b, case.l, case.d).to(device, case.dtype)
    if case.strided:
        prompts, tokens = (torch.stack((x, x), -1)[..., 0].transpose(0, 1) for x in (prompts, tokens))
        prompts, tokens = (x.contiguous().transpose(0, 1) for x in (prompts, tokens))
        tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    return Tensors(tokens, prompts)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Sums of a few small integers leave nothing to round; y is a copy of whatever there is."""
    return make(case, device, seed), OPERATOR.output_gradient(case, device, seed).mul(4).round()


def _as_oracle(tensors: Tensors) -> tuple[Tensor, Tensor]:
    return tensors.prompts, tensors.token_embeddings


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, Any]:
    """Float32 prompts are cast to the tokens' dtype first."""
    wide = tensors.prompts.to(case.dtype).double(), tensors.token_embeddings.double()
    y = oracle.forward(*wide) if case.n * case.b else wide[0].new_empty(case.y_shape)
    prompts, tokens = oracle.backward(dy.double(), *wide)
    return y, Tensors(tokens, prompts)


OPERATOR = Operator(
    function=op.prompt_tuning,
    op=op,
    differentiable=Tensors._fields,
    variants=BACKENDS,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=lambda case, tensors: tensors._asdict(),
    eager=lambda case, tensors: oracle.eager(*_as_oracle(tensors)),
    oracle=_oracle,
    draws=lambda case: min(8, 200 // (case.n * case.d)),
    unrounded=("y",),
    budget=(
        *itertools.product(GRID, BACKENDS),
        # What auto makes of one prompt on a CPU: torch's own operators.
        *((replace(case, n=1), "auto") for case in GRID if case.prompt_dtype is None),
    ),
    exact=st.builds(
        lambda dtypes, **sizes: Case(dtype=dtypes[0], prompt_dtype=dtypes[1], **sizes),
        n=st.integers(1, 4),
        b=st.integers(1, 4),
        p=st.integers(0, 20),
        l=st.integers(0, 20),
        d=st.integers(1, 40),
        dtypes=st.sampled_from(DTYPES),
        strided=st.booleans(),
    ),
    exact_draws=25,
    exact_examples=(Case(),),
    repeated=(
        *((Case(b=30, dtype=torch.bfloat16), backend) for backend in BACKENDS),
        (Case(n=1, b=30, dtype=torch.bfloat16), "auto"),
    ),
    typical=Case(),
    kinds=(Case(), Case(dtype=torch.bfloat16, prompt_dtype=torch.float32)),
    gradcheck=(Case(d=3, dtype=torch.float64),),
    far=(Case(n=1, b=3, dtype=torch.bfloat16), ("token_embeddings",)),
    empty=tuple(replace(Case(), **sizes) for sizes in ({"b": 0}, {"n": 0}, {"p": 0, "l": 0}, {"d": 0})),
    wrong_case=Case(d=8),
    wrong=(
        ({"prompts": [1.0]}, "prompts must be a torch.Tensor, got list"),
        ({"token_embeddings": None}, "token_embeddings must be a torch.Tensor, got NoneType"),
        ({"prompts": torch.ones(4, 8)}, r"prompts must be \(N, P, D\), got a tensor of shape \(4, 8\)"),
        ({"token_embeddings": torch.ones(5, 8)}, r"token_embeddings must be \(B, L, D\)"),
        ({"prompts": torch.ones(2, 4, 7)}, r"prompts must be \(N, P, D\) = \(2, 4, 8\), got \(2, 4, 7\)"),
        (
            {"token_embeddings": torch.ones(3, 5, 8, dtype=torch.int64)},
            "token_embeddings must have one of the dtypes .*got torch.int64",
        ),
        ({"prompts": torch.ones(2, 4, 8).bfloat16()}, "prompts must have the dtype of token_embeddings, or float32"),
        (
            {"prompts": torch.ones(2, 4, 8, device="meta")},
            r"prompts must be on the device of token_embeddings \(cpu\), got meta",
        ),
    ),
    unsupported=(
        ("cuda", Case(), "there is no 'cuda' implementation"),
        ("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
    ),
)

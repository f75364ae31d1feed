"""Problems of the LoRA linear family, and what its operator owes."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels.lora.linear import op
from python_ref import lora as oracle
from tests.contract.draw import DTYPES, MATRIX_LAYOUTS, Draw, dtypes_name, laid_out
from tests.contract.operators import Operator, double

SEED = 20240229

VARIANTS = ("torch", "triton")
# What auto makes of small calls on a CPU: torch's own operators.
WITH_AUTO = (*VARIANTS, "auto")


@dataclass(frozen=True)
class Case:
    """One problem; ``layout`` says how x lies in memory."""

    m: int = 37
    n: int = 72
    k: int = 40
    r: int = 5
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    p: float = 0.0
    bias: bool = True
    scale: float | Tensor = 0.75
    layout: str = "rows"

    @property
    def y_shape(self) -> tuple[int, int]:
        return self.m, self.n

    @property
    def y_dtype(self) -> torch.dtype:
        return self.dtype

    def __str__(self) -> str:
        sizes = f"{self.m}x{self.n}x{self.k}-r{self.r}-{dtypes_name(self.dtype, self.adapter_dtype)}-p{self.p}"
        return f"{sizes}-{self.layout}{'-nobias' * (not self.bias)}{'-tensorscale' * isinstance(self.scale, Tensor)}"


class Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None


# Shapes: ragged in every size; aligned, with several tiles; one token; ranks below, at and above a
# block, and beyond one.
SHAPES = (
    Case(m=37, n=35, k=50, r=5),
    Case(m=140, n=264, k=136, r=16),
    Case(m=1, n=72, k=136, r=32),
    Case(m=70, n=40, k=72, r=33),
    Case(m=20, n=40, k=264, r=130),
)

GRID = (
    *(
        replace(shape, dtype=dtype, adapter_dtype=adapter, p=p, bias=index % 2 == 0)
        for index, shape in enumerate(SHAPES)
        for dtype, adapter in DTYPES
        for p in (0.0, 0.3)
    ),
    Case(layout="columns"),
    Case(layout="strided", dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.3),
    Case(layout="expanded", dtype=torch.bfloat16),
    # Few rows and a long reduction: K is split between programs, whose partial sums are added afterwards.
    Case(m=9, n=24, k=1100),
    Case(m=9, n=24, k=1100, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.3),
    Case(m=9, r=512, dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.1),
    Case(p=0.99, m=200, k=136),
    Case(scale=-3.0, bias=False),
    Case(scale=0.0),
    # Many small terms beside a large base.
    Case(m=1, n=3, k=16, r=130, scale=0.1),
)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; the low-rank term is about as large as the base product."""
    draw = Draw(seed)
    drawn = Tensors(
        x=draw.normal(case.m, case.k),
        weight=draw.normal(case.n, case.k, std=case.k**-0.5),
        lora_a=draw.normal(case.r, case.k, std=case.k**-0.5),
        lora_b=draw.normal(case.n, case.r, std=case.r**-0.5),
        bias=draw.normal(case.n),
    )
    return _as_asked(case, drawn, device)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient.

    Rows of x and of the gradient hold a single 1 or -1, so no sum exceeds the rank or the rows plus two, below 256.
    """
    draw = Draw(seed)
    drawn = Tensors(
        x=draw.single_signs(case.m, case.k),
        weight=draw.integers(1, case.n, case.k),
        lora_a=draw.integers(1, case.r, case.k),
        lora_b=draw.integers(1, case.n, case.r),
        bias=draw.integers(1, case.n),
    )
    return _as_asked(case, drawn, device), draw.single_signs(case.m, case.n).to(device, case.dtype)


def _as_asked(case: Case, drawn: Tensors, device: torch.device) -> Tensors:
    """Put float64 tensors on the device in the case's dtypes, and x in its layout."""
    adapter = case.adapter_dtype or case.dtype
    return Tensors(
        x=laid_out(drawn.x.to(device, case.dtype), case.layout),
        weight=drawn.weight.to(device, case.dtype),
        lora_a=drawn.lora_a.to(device, adapter),
        lora_b=drawn.lora_b.to(device, adapter),
        bias=drawn.bias.to(device, case.dtype) if case.bias else None,
    )


def keep_mask(case: Case, device: torch.device) -> Tensor | None:
    """The mask of SEED, from the oracle's own recipe."""
    return oracle.dropout_mask(SEED, case.m, case.k, case.p).to(device) if case.p else None


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    return {**tensors._asdict(), "scale": case.scale, "dropout_p": case.p, "seed": SEED}


def _eager(case: Case, tensors: Tensors) -> Tensor:
    mask = keep_mask(case, tensors.x.device)
    return oracle.eager(**tensors._asdict(), scale=case.scale, dropout_mask=mask, dropout_p=case.p)


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, oracle.Gradients]:
    *factors, bias = double(tensors)
    dropout = {"dropout_mask": keep_mask(case, dy.device), "dropout_p": case.p}
    y, _ = oracle.forward(*factors, case.scale, bias, **dropout)
    return y, oracle.backward(dy.double(), *factors, case.scale, **dropout)


_SMALL = Case(m=4, n=24, k=16, r=4)

OPERATOR = Operator(
    function=op.lora_linear,
    op=op,
    differentiable=Tensors._fields,
    variants=WITH_AUTO,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=_eager,
    oracle=_oracle,
    # S, whose errors reach most results, has m r values.
    draws=lambda case: min(16, 256 // (case.m * case.r)),
    budget=(
        *itertools.product(GRID, VARIANTS),
        *((case, "auto") for case in GRID if case.adapter_dtype is None),
    ),
    exact=st.builds(
        lambda dtypes, **rest: Case(dtype=dtypes[0], adapter_dtype=dtypes[1], scale=0.5, **rest),
        **{size: st.integers(1, 40) for size in "mnkr"},
        dtypes=st.sampled_from(DTYPES),
        p=st.sampled_from([0.0, 0.5]),
        bias=st.booleans(),
        layout=st.sampled_from(MATRIX_LAYOUTS),
    ),
    exact_draws=60,
    exact_examples=(
        Case(p=0.5, scale=0.5),
        Case(2, 1, 1, 1, scale=0.5),
        Case(1, 1, 1, 1, *DTYPES[3], p=0.5, bias=False, scale=0.5),
    ),
    repeated=tuple(
        (Case(m=260, n=136, k=72, r=8, dtype=dtype, adapter_dtype=adapter, p=p), variant)
        for dtype, adapter in (DTYPES[0], DTYPES[3])
        for p in (0.0, 0.3)
        for variant in WITH_AUTO
    ),
    typical=Case(p=0.3, r=40),
    kinds=tuple(replace(_SMALL, p=p, scale=scale) for p in (0.0, 0.3) for scale in (0.5, torch.tensor(0.5))),
    gradcheck=tuple(Case(m=6, n=4, k=5, r=2, dtype=torch.float64, p=p) for p in (0.0, 0.3)),
    far=(replace(_SMALL, dtype=torch.bfloat16), ("x",)),
    empty=(Case(m=0), Case(n=0, bias=False)),
    rows=((_SMALL, ("x",)),),
    scaled=(Case(p=0.3),),
    wrong_case=Case(m=3, n=6, k=8, r=2, bias=False),
    wrong=(
        ({"x": torch.randn(3, 7)}, r"x must be \(\.\.\., K\) with K = 8"),
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., K\), got a 0-d"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must have one of the dtypes .*got torch.int64"),
        ({"weight": torch.randn(6, 8).bfloat16()}, r"weight must have the dtype of x \(torch.float32\)"),
        ({"weight": torch.randn(8)}, r"weight must be \(N, K\)"),
        ({"lora_a": torch.randn(2, 7)}, r"lora_a must be \(r, K\) = \(2, 8\), got \(2, 7\)"),
        ({"lora_a": torch.randn(0, 8), "lora_b": torch.randn(6, 0)}, ".* rank r >= 1, got rank 0"),
        ({"lora_a": torch.randn(2, 8).bfloat16()}, "lora_a must have the dtype of x, or float32"),
        ({"lora_b": torch.randn(5, 2)}, r"lora_b must be \(N, r\) = \(6, 2\), got \(5, 2\)"),
        ({"lora_b": torch.randn(6, 2).double()}, "lora_b must have the dtype of lora_a"),
        ({"bias": torch.randn(5)}, r"bias must be \(N,\) = \(6,\), got \(5,\)"),
        ({"bias": torch.randn(6).double()}, "bias must have the dtype of x"),
        ({"weight": torch.randn(6, 8, device="meta")}, r"weight must be on the device of x \(cpu\), got meta"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\), got -0.1"),
        ({"dropout_p": math.nan}, r"dropout_p must be in \[0, 1\), got nan"),
        ({"dropout_p": 0.5, "seed": 1.5}, "seed must be None, a 64-bit int"),
        ({"dropout_p": 0.5, "seed": 2**63}, "seed must be None, a 64-bit int"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, "seed must be a 0-d int64 tensor"),
        ({"scale": torch.ones(2)}, "scale must be a float or a 0-d floating tensor"),
        ({"scale": "1"}, "scale must be a float or a 0-d floating tensor, got str"),
    ),
    unsupported=(
        ("cuda", Case(), "backend 'cuda' cannot run this problem: CUDA kernels run on CUDA tensors"),
        ("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
    ),
)

# What the tests of this family's CUDA kernels call.
check_budget, output_gradient = OPERATOR.check_budget, OPERATOR.output_gradient
run_eager, run_oracle = OPERATOR.run_eager, OPERATOR.run_oracle

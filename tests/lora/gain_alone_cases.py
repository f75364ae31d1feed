"""Problems of the operator ``lora_gain_alone``, and what it owes."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels.lora.gain_alone import op
from python_ref import lora as oracle
from tests.contract.draw import DTYPES, MATRIX_LAYOUTS, Draw, dtypes_name, laid_out
from tests.contract.operators import Operator, double

VARIANTS = ("torch", "triton")


@dataclass(frozen=True)
class Case:
    """One problem; ``layout`` says how x lies in memory, and a gain without a dtype of its own has x's."""

    m: int = 37
    n: int = 72
    k: int = 40
    dtype: torch.dtype = torch.float32
    gain_dtype: torch.dtype | None = None
    bias: bool = True
    layout: str = "rows"

    @property
    def y_shape(self) -> tuple[int, int]:
        return self.m, self.n

    @property
    def y_dtype(self) -> torch.dtype:
        return self.dtype

    def __str__(self) -> str:
        dtypes = dtypes_name(self.dtype, self.gain_dtype)
        return f"{self.m}x{self.n}x{self.k}-{dtypes}-{self.layout}{'-nobias' * (not self.bias)}"


class Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    gain: Tensor
    bias: Tensor | None


# Ragged in every size, with more rows than columns of W and less; one token.
SHAPES = (
    Case(m=61, n=35, k=50),
    Case(m=140, n=136, k=136),
    Case(m=40, n=40, k=72),
    Case(m=1, n=72, k=136),
)

GRID = (
    *(
        replace(shape, dtype=dtype, gain_dtype=gain, bias=(index + place) % 2 == 0)
        for index, shape in enumerate(SHAPES)
        for place, (dtype, gain) in enumerate(DTYPES)
    ),
    Case(layout="columns"),
    Case(layout="strided", dtype=torch.bfloat16, gain_dtype=torch.float32),
)


def _drawn(case: Case, device: torch.device, values: Tensors) -> Tensors:
    return Tensors(
        laid_out(values.x.to(device, case.dtype), case.layout),
        values.weight.to(device, case.dtype),
        values.gain.to(device, case.gain_dtype or case.dtype),
        None if values.bias is None or not case.bias else values.bias.to(device, case.dtype),
    )


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; a gain may be zero."""
    draw = Draw(seed)
    gain = 1.0 + 0.3 * draw.normal(case.n)
    gain[: case.n // 9] = 0.0
    values = draw.normal(case.m, case.k), draw.normal(case.n, case.k, std=case.k**-0.5), gain, draw.normal(case.n)
    return _drawn(case, device, Tensors(*values))


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient.

    A row of x and of the gradient holds a single 1 or -1.
    """
    draw = Draw(seed)
    shapes = (case.n, case.k), (case.n,), (case.n,)
    values = Tensors(draw.single_signs(case.m, case.k), *(draw.integers(1, *shape) for shape in shapes))
    return _drawn(case, device, values), draw.single_signs(case.m, case.n).to(device, case.dtype)


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    return tensors._asdict()


def _eager(case: Case, tensors: Tensors) -> Tensor:
    return oracle.eager_gain_alone(*tensors)


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, oracle.GainAloneGradients]:
    wide = double(tensors)
    return oracle.gain_alone_forward(*wide), oracle.gain_alone_backward(dy.double(), *wide)


_SMALL = Case(m=4, n=24, k=16)

OPERATOR = Operator(
    function=op.linear_with_gain_alone,
    op=op,
    differentiable=Tensors._fields,
    variants=VARIANTS,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=_eager,
    oracle=_oracle,
    # The gain's gradient has n values.
    draws=lambda case: min(16, max(1, 512 // case.n)),
    budget=tuple(itertools.product(GRID, VARIANTS)),
    exact=st.builds(
        lambda dtypes, **rest: Case(dtype=dtypes[0], gain_dtype=dtypes[1], **rest),
        **{size: st.integers(1, 40) for size in "mnk"},
        dtypes=st.sampled_from(DTYPES),
        bias=st.booleans(),
        layout=st.sampled_from(MATRIX_LAYOUTS),
    ),
    exact_draws=12,
    exact_examples=(Case(), Case(2, 1, 1)),
    repeated=tuple(
        (Case(m=260, n=136, k=72, dtype=dtype, gain_dtype=gain), variant)
        for dtype, gain in (DTYPES[0], DTYPES[3])
        for variant in VARIANTS
    ),
    typical=Case(),
    kinds=(_SMALL, replace(_SMALL, dtype=torch.bfloat16, gain_dtype=torch.float32)),
    gradcheck=(Case(m=6, n=4, k=5, dtype=torch.float64), Case(m=3, n=4, k=5, dtype=torch.float64, bias=False)),
    far=(replace(_SMALL, dtype=torch.bfloat16), ("x",)),
    empty=(Case(m=0), Case(n=0, bias=False)),
    rows=((_SMALL, ("x",)),),
    wrong_case=Case(m=3, n=6, k=8, bias=False),
    wrong=(
        ({"gain": torch.randn(5)}, r"gain must be \(N,\) = \(6,\), got \(5,\)"),
        ({"gain": torch.randn(6).double()}, "gain must have the dtype of x"),
        ({"gain": 1.0}, "gain must be a torch.Tensor, got float"),
        ({"gain": torch.randn(6, device="meta")}, r"gain must be on the device of x \(cpu\), got meta"),
        ({"x": torch.randn(3, 7)}, r"x must be \(\.\.\., K\) with K = 8"),
        ({"bias": torch.randn(5)}, r"bias must be \(N,\) = \(6,\), got \(5,\)"),
    ),
    unsupported=(
        ("cuda", Case(), "lora_gain_alone: .*'cuda'"),
        ("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
    ),
)

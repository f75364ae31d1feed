"""Problems of the operator ``lora_gain``, and what it owes."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels.lora.gain import op
from peft_kernels.lora.linear.op import lora_linear
from python_ref import lora as oracle
from tests.contract.draw import DTYPES, MATRIX_LAYOUTS, Draw, dtypes_name, laid_out
from tests.contract.operators import Operator, double

SEED = 20240229
VARIANTS = ("torch", "triton")
# What auto makes of small calls on a CPU: torch's own operators.
WITH_AUTO = (*VARIANTS, "auto")


@dataclass(frozen=True)
class Case:
    """One problem; ``layout`` says how x lies in memory, and a gain without a dtype of its own has x's."""

    m: int = 37
    n: int = 72
    k: int = 40
    r: int = 5
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    gain_dtype: torch.dtype | None = None
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
        dtypes = f"{dtypes_name(self.dtype, self.adapter_dtype)}-g{dtypes_name(self.gain_dtype or self.dtype)}"
        flags = f"{'-nobias' * (not self.bias)}{'-tensorscale' * isinstance(self.scale, Tensor)}"
        return f"{self.m}x{self.n}x{self.k}-r{self.r}-{dtypes}-p{self.p}-{self.layout}{flags}"


class Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    gain: Tensor
    bias: Tensor | None


# Ragged in every size, with more rows than columns of W and less; ranks within a block, and beyond those that share a
# pass; one token.
SHAPES = (
    Case(m=61, n=35, k=50, r=5),
    Case(m=140, n=136, k=136, r=16),
    Case(m=40, n=40, k=72, r=33),
    Case(m=1, n=72, k=136, r=32),
)

GRID = (
    *(
        replace(shape, dtype=dtype, adapter_dtype=adapter, gain_dtype=gain, bias=index % 2 == 0)
        for index, shape in enumerate(SHAPES)
        for dtype, adapter in DTYPES
        for gain in ((torch.float32, None)[index % 2],)
    ),
    *(
        replace(SHAPES[0], dtype=dtype, adapter_dtype=adapter, gain_dtype=torch.float32, p=0.3)
        for dtype, adapter in DTYPES
    ),
    Case(layout="columns", p=0.3),
    Case(layout="strided", dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(m=9, n=24, k=1100, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(scale=-3.0, bias=False),
    Case(scale=0.0),
)


def _drawn(case: Case, device: torch.device, values: Tensors) -> Tensors:
    adapter, x = case.adapter_dtype or case.dtype, values.x.to(device, case.dtype)
    return Tensors(
        laid_out(x, case.layout),
        values.weight.to(device, case.dtype),
        values.lora_a.to(device, adapter),
        values.lora_b.to(device, adapter),
        values.gain.to(device, case.gain_dtype or case.dtype),
        None if values.bias is None or not case.bias else values.bias.to(device, case.dtype),
    )


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; the low-rank term is about as large as the base product, and a gain may be zero."""
    draw = Draw(seed)
    gain = 1.0 + 0.3 * draw.normal(case.n)
    gain[: case.n // 9] = 0.0
    values = Tensors(
        draw.normal(case.m, case.k),
        draw.normal(case.n, case.k, std=case.k**-0.5),
        draw.normal(case.r, case.k, std=case.k**-0.5),
        draw.normal(case.n, case.r, std=case.r**-0.5),
        gain,
        draw.normal(case.n),
    )
    return _drawn(case, device, values)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient.

    As lora_linear's: a row of x and of the gradient holds a single 1 or -1.
    """
    draw = Draw(seed)
    shapes = (case.n, case.k), (case.r, case.k), (case.n, case.r), (case.n,), (case.n,)
    values = Tensors(draw.single_signs(case.m, case.k), *(draw.integers(1, *shape) for shape in shapes))
    return _drawn(case, device, values), draw.single_signs(case.m, case.n).to(device, case.dtype)


def keep_mask(case: Case, device: torch.device) -> Tensor | None:
    """The mask of SEED, from the oracle's own recipe."""
    return oracle.dropout_mask(SEED, case.m, case.k, case.p).to(device) if case.p else None


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    return {**tensors._asdict(), "scale": case.scale, "dropout_p": case.p, "seed": SEED}


def _eager(case: Case, tensors: Tensors) -> Tensor:
    mask = keep_mask(case, tensors.x.device)
    return oracle.eager_gain(**tensors._asdict(), scale=case.scale, dropout_mask=mask, dropout_p=case.p)


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, oracle.GainGradients]:
    *factors, bias = double(tensors)
    dropout = {"dropout_mask": keep_mask(case, dy.device), "dropout_p": case.p}
    y = oracle.gain_forward(*factors, case.scale, bias, **dropout)
    return y, oracle.gain_backward(dy.double(), *factors, case.scale, **dropout)


_SMALL = Case(m=4, n=24, k=16, r=4)

OPERATOR = Operator(
    function=lora_linear,
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
        *((case, "auto") for case in GRID if case.dtype == torch.float32 and not case.p),
    ),
    exact=st.builds(
        lambda dtypes, **rest: Case(dtype=dtypes[0], adapter_dtype=dtypes[1], scale=0.5, **rest),
        **{size: st.integers(1, 40) for size in "mnkr"},
        dtypes=st.sampled_from(DTYPES),
        gain_dtype=st.sampled_from([None, torch.float32]),
        p=st.sampled_from([0.0, 0.5]),
        bias=st.booleans(),
        layout=st.sampled_from(MATRIX_LAYOUTS),
    ),
    exact_draws=12,
    exact_examples=(Case(p=0.5, scale=0.5), Case(2, 1, 1, 1, scale=0.5)),
    repeated=tuple(
        (Case(m=260, n=136, k=72, r=8, dtype=dtype, adapter_dtype=adapter), variant)
        for dtype, adapter in (DTYPES[0], DTYPES[3])
        for variant in VARIANTS
    ),
    # What the gain's gradient is made of, that of B needs a part of.
    typical=Case(p=0.3, r=40),
    kinds=(replace(_SMALL, p=0.3, scale=0.5), replace(_SMALL, gain_dtype=torch.float32, scale=torch.tensor(0.5))),
    gradcheck=tuple(Case(m=6, n=4, k=5, r=2, dtype=torch.float64, p=p) for p in (0.0, 0.3)),
    far=(replace(_SMALL, dtype=torch.bfloat16), ("x",)),
    empty=(Case(m=0), Case(n=0, bias=False)),
    rows=((_SMALL, ("x",)),),
    scaled=(Case(),),
    wrong_case=Case(m=3, n=6, k=8, r=2, bias=False),
    wrong=(
        ({"gain": torch.randn(5)}, r"gain must be \(N,\) = \(6,\), got \(5,\)"),
        ({"gain": torch.randn(6, 1)}, r"gain must be \(N,\) = \(6,\), got \(6, 1\)"),
        ({"gain": torch.randn(6).double()}, "gain must have the dtype of x"),
        ({"gain": 1.0}, "gain must be a torch.Tensor, got float"),
        ({"gain": torch.randn(6, device="meta")}, r"gain must be on the device of x \(cpu\), got meta"),
        ({"x": torch.randn(3, 7)}, r"x must be \(\.\.\., K\) with K = 8"),
        ({"lora_b": torch.randn(5, 2)}, r"lora_b must be \(N, r\) = \(6, 2\), got \(5, 2\)"),
        ({"scale": torch.ones(2)}, "scale must be a float or a 0-d floating tensor"),
    ),
    unsupported=(
        ("cuda", Case(), "lora_gain: .*'cuda'"),
        ("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
    ),
)

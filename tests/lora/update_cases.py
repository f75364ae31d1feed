"""Problems of LoRA's update of a given y, and what its operator owes."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels.lora.update import op
from python_ref import lora as oracle
from tests.contract.draw import DTYPES, MATRIX_LAYOUTS, Draw, dtypes_name, laid_out
from tests.contract.operators import Operator, double
from tests.lora.cases import SEED, VARIANTS, WITH_AUTO


@dataclass(frozen=True)
class Case:
    """One problem; ``layout`` says how x and y lie in memory; y and x may have two dtypes."""

    m: int = 37
    n: int = 72
    k: int = 40
    r: int = 5
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    given_dtype: torch.dtype | None = None
    p: float = 0.0
    scale: float | Tensor = 0.75
    layout: str = "rows"

    @property
    def y_shape(self) -> tuple[int, int]:
        return self.m, self.n

    @property
    def y_dtype(self) -> torch.dtype:
        return self.given_dtype or self.dtype

    def __str__(self) -> str:
        dtypes = dtypes_name(self.dtype, self.adapter_dtype)
        given = f"-to-{dtypes_name(self.given_dtype)}" if self.given_dtype else ""
        sizes = f"{self.m}x{self.n}x{self.k}-r{self.r}-{dtypes}{given}-p{self.p}"
        return f"{sizes}-{self.layout}{'-tensorscale' * isinstance(self.scale, Tensor)}"


class Tensors(NamedTuple):
    y: Tensor
    x: Tensor
    lora_a: Tensor
    lora_b: Tensor


# Shapes: ragged in every size; aligned, with several tiles; ranks beyond a block.
SHAPES = (
    Case(m=37, n=35, k=50, r=5),
    Case(m=70, n=136, k=136, r=16),
    Case(m=20, n=40, k=72, r=130),
)
# Of x, the factors and y: what autocast makes of a base that returns float32, and the other ways round.
MIXED = (
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.float32, torch.float16),
)

GRID = (
    *(
        replace(shape, dtype=dtype, adapter_dtype=adapter, p=0.3 * ((index + place) % 2))
        for index, shape in enumerate(SHAPES)
        for place, (dtype, adapter) in enumerate(DTYPES)
    ),
    *(
        Case(dtype=dtype, adapter_dtype=adapter, given_dtype=given, p=0.3 * (index % 2))
        for index, (dtype, adapter, given) in enumerate(MIXED)
    ),
    Case(layout="columns"),
    Case(layout="strided", dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.3),
    Case(layout="expanded", dtype=torch.bfloat16),
    Case(scale=0.0),
)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; the update is about as large as y."""
    draw = Draw(seed)
    drawn = Tensors(
        y=draw.normal(case.m, case.n),
        x=draw.normal(case.m, case.k),
        lora_a=draw.normal(case.r, case.k, std=case.k**-0.5),
        lora_b=draw.normal(case.n, case.r, std=case.r**-0.5),
    )
    return _as_asked(case, drawn, device)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient."""
    draw = Draw(seed)
    drawn = Tensors(
        y=draw.integers(1, case.m, case.n),
        x=draw.single_signs(case.m, case.k),
        lora_a=draw.integers(1, case.r, case.k),
        lora_b=draw.integers(1, case.n, case.r),
    )
    return _as_asked(case, drawn, device), draw.single_signs(case.m, case.n).to(device, case.y_dtype)


def _as_asked(case: Case, drawn: Tensors, device: torch.device) -> Tensors:
    """Put float64 tensors on the device in the case's dtypes, and x and y in its layout."""
    adapter = case.adapter_dtype or case.dtype
    return Tensors(
        y=laid_out(drawn.y.to(device, case.y_dtype), case.layout),
        x=laid_out(drawn.x.to(device, case.dtype), case.layout),
        lora_a=drawn.lora_a.to(device, adapter),
        lora_b=drawn.lora_b.to(device, adapter),
    )


def _dropout(case: Case, device: torch.device) -> dict[str, Any]:
    """The mask of SEED, from the oracle's own recipe."""
    mask = oracle.dropout_mask(SEED, case.m, case.k, case.p).to(device) if case.p else None
    return {"dropout_mask": mask, "dropout_p": case.p}


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    return {**tensors._asdict(), "scale": case.scale, "dropout_p": case.p, "seed": SEED}


def _eager(case: Case, tensors: Tensors) -> Tensor:
    return oracle.eager_update(*tensors, case.scale, **_dropout(case, tensors.x.device))


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, oracle.UpdateGradients]:
    wide, dropout = double(tensors), _dropout(case, dy.device)
    y = oracle.update_forward(*wide, case.scale, **dropout)
    return y, oracle.update_backward(dy.double(), *wide[1:], case.scale, **dropout)


_SMALL = Case(m=4, n=24, k=16, r=4)

OPERATOR = Operator(
    function=op.lora_update,
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
        *((case, "auto") for case in GRID[::4] if case.adapter_dtype is case.given_dtype is None),
    ),
    exact=st.builds(
        lambda dtypes, given, **rest: Case(
            dtype=dtypes[0], adapter_dtype=dtypes[1], given_dtype=given, scale=0.5, **rest
        ),
        **{size: st.integers(1, 40) for size in "mnkr"},
        dtypes=st.sampled_from(DTYPES),
        given=st.sampled_from([None, torch.float32]),
        p=st.sampled_from([0.0, 0.5]),
        layout=st.sampled_from(MATRIX_LAYOUTS),
    ),
    exact_draws=8,
    exact_examples=(
        Case(p=0.5, scale=0.5),
        Case(2, 1, 1, 1, scale=0.5),
        Case(1, 1, 1, 1, *DTYPES[3], p=0.5, scale=0.5),
    ),
    repeated=tuple(
        (Case(m=140, n=72, k=72, r=8, dtype=dtype, adapter_dtype=adapter, p=0.3), variant)
        for dtype, adapter in (DTYPES[0], DTYPES[3])
        for variant in VARIANTS
    ),
    typical=Case(p=0.3, r=40),
    kinds=(_SMALL, replace(_SMALL, p=0.3, scale=torch.tensor(0.5))),
    gradcheck=tuple(Case(m=6, n=4, k=5, r=2, dtype=torch.float64, p=p) for p in (0.0, 0.3)),
    far=(replace(_SMALL, dtype=torch.bfloat16), ("y", "x")),
    empty=(Case(m=0), Case(n=0)),
    rows=((_SMALL, ("y", "x")),),
    scaled=(Case(p=0.3),),
    wrong_case=Case(m=3, n=6, k=8, r=2),
    wrong=(
        ({"x": torch.randn(3, 7)}, r"lora_a must be \(r, K\) = \(2, 7\), got \(2, 8\)"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"y": torch.randn(3, 7)}, r"y must be \(\.\.\., N\) = \(3, 6\), got \(3, 7\)"),
        ({"y": torch.randn(1, 6)}, r"y must be \(\.\.\., N\) = \(3, 6\), got \(1, 6\)"),
        ({"y": None}, "y must be a torch.Tensor, got NoneType"),
        (
            {"y": torch.randn(3, 6).double()},
            r"y must have x's dtype \(torch.float32\), or another .* got torch.float64",
        ),
        ({"y": torch.ones(3, 6, dtype=torch.int64)}, "y must have x's dtype .* got torch.int64"),
        ({"y": torch.randn(3, 6, device="meta")}, r"y must be on the device of x \(cpu\), got meta"),
        ({"lora_a": torch.randn(0, 8), "lora_b": torch.randn(6, 0)}, ".* rank r >= 1, got rank 0"),
        ({"lora_a": torch.randn(2, 8).bfloat16()}, "lora_a must have the dtype of x, or float32"),
        ({"lora_b": torch.randn(5, 2)}, r"y must be \(\.\.\., N\) = \(3, 5\), got \(3, 6\)"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": math.nan}, r"dropout_p must be in \[0, 1\), got nan"),
        ({"dropout_p": 0.5, "seed": 1.5}, "seed must be None, a 64-bit int"),
        ({"scale": torch.ones(2)}, "scale must be a float or a 0-d floating tensor"),
    ),
    unsupported=(("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),),
)

"""Problems of the operator ``lora_update_rows``, and what it owes, by way of ``lora_update(rows=)``."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import peft_kernels as pk
from peft_kernels.lora.update_rows import op
from python_ref import lora as oracle
from tests.contract.draw import DTYPES, MATRIX_LAYOUTS, Draw, laid_out
from tests.contract.operators import Operator, double
from tests.lora import rows_cases
from tests.lora.rows_cases import PATTERNS, SEED, VARIANTS, slots
from tests.lora.update_cases import MIXED


@dataclass(frozen=True)
class Case(rows_cases.Case):
    """One problem; y and x may have two dtypes. There is no bias."""

    given_dtype: torch.dtype | None = None

    @property
    def y_dtype(self) -> torch.dtype:
        return self.given_dtype or self.dtype

    def __str__(self) -> str:
        return super().__str__() + (f"-to-{str(self.given_dtype).removeprefix('torch.')}" if self.given_dtype else "")


class Tensors(NamedTuple):
    y: Tensor
    x: Tensor
    lora_a: Tensor
    lora_b: Tensor


def lora_update_rows(*, backend: str | None = None, **arguments: Any) -> Tensor:
    """As users call it."""
    return pk.lora_update(**arguments, backend=backend)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; the update is about as large as y."""
    found, draw = rows_cases.make(case, device, seed), Draw(seed + 1)
    return _as_asked(case, draw.normal(case.m, case.n), found)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient."""
    found, dy = rows_cases.make_exact(case, device, seed)
    return _as_asked(case, Draw(seed + 1).integers(1, case.m, case.n), found), dy.to(case.y_dtype)


def _as_asked(case: Case, y: Tensor, found: rows_cases.Tensors) -> Tensors:
    y = laid_out(y.to(found.x.device, case.y_dtype), case.layout)
    return Tensors(y, found.x, found.lora_a, found.lora_b)


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    rows = pk.Rows.of(case.slot, known=len(case.ranks), device=tensors.x.device)
    facts = {"rows": rows, "ranks": case.ranks, "dropout_p": case.ps, "seed": SEED}
    return {**tensors._asdict(), "scale": case.scales, **facts}


def _eager(case: Case, tensors: Tensors) -> Tensor:
    return oracle.eager_update_rows(tensors.y, tensors.x, slots(case, tensors), case.slot)


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, Tensors]:
    wide = double(tensors)
    of_slots = slots(case, wide)
    found = oracle.update_rows_backward(dy.double(), wide.x, of_slots, case.slot)
    # The factors of no slot at all have no elements.
    da, db = torch.cat([wide.lora_a[:0], *found.lora_a]), torch.cat([wide.lora_b[:, :0], *found.lora_b], dim=1)
    y = oracle.update_rows_forward(wide.y, wide.x, of_slots, case.slot)
    return y, Tensors(dy.double(), found.x, da, db)


GRID = (
    *(
        Case(m=37, n=35, k=50, ranks=(5, 3, 0, 17), dtype=dtype, adapter_dtype=adapter, p=0.3 * (index % 2))
        for index, (dtype, adapter) in enumerate(DTYPES)
    ),
    *(
        Case(dtype=dtype, adapter_dtype=adapter, given_dtype=given, p=0.3 * (index % 2))
        for index, (dtype, adapter, given) in enumerate(MIXED)
    ),
    Case(m=1, n=40, k=136, ranks=(32,), pattern="one", p=0.3),
    Case(m=40, n=24, k=72, ranks=(33, 1, 140), pattern="own"),
    Case(m=64, n=24, k=40, ranks=(4,) * 20, dtype=torch.bfloat16),
    Case(layout="strided", dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.3),
    Case(layout="expanded"),
    Case(scale=-3.0),
)

_SMALL = Case(m=6, n=16, k=16, ranks=(4, 2), pattern="own")

OPERATOR = Operator(
    function=lora_update_rows,
    op=op,
    differentiable=Tensors._fields,
    variants=VARIANTS,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=_eager,
    oracle=_oracle,
    draws=rows_cases.OPERATOR.draws,
    # The interpreter takes long, and the kernels have problems of their own.
    budget=tuple((case, name) for name in VARIANTS for case in (GRID if name == "torch" else GRID[::3])),
    exact=st.builds(
        lambda ranks, **rest: Case(ranks=tuple(ranks), scale=0.5, **rest),
        m=st.integers(1, 40),
        k=st.integers(1, 40),
        n=st.integers(1, 40),
        ranks=st.lists(st.integers(0, 40), min_size=1, max_size=7),
        pattern=st.sampled_from(PATTERNS),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        adapter_dtype=st.sampled_from([None, torch.float32]),
        given_dtype=st.sampled_from([None, torch.float32]),
        layout=st.sampled_from(MATRIX_LAYOUTS),
    ),
    exact_draws=6,
    exact_examples=(
        Case(scale=0.5),
        Case(1, 2, 1, (1,), "one", torch.bfloat16, torch.float32, given_dtype=torch.float32, scale=0.5),
    ),
    repeated=tuple(
        (Case(m=140, n=72, k=72, ranks=(8, 20), dtype=dtype, adapter_dtype=adapter, p=0.3), variant)
        for (dtype, adapter), variant in itertools.product((DTYPES[0], DTYPES[3]), VARIANTS)
    ),
    shared=rows_cases.OPERATOR.shared,
    typical=Case(p=0.3, ranks=(40, 5, 3)),
    kinds=(_SMALL, replace(_SMALL, p=0.3, scale=torch.tensor(0.5))),
    gradcheck=tuple(Case(m=5, n=4, k=5, ranks=(2, 0, 1), dtype=torch.float64, p=p) for p in (0.0, 0.3)),
    far=(replace(_SMALL, dtype=torch.bfloat16), ("y", "x")),
    empty=(Case(m=0), Case(n=0), Case(ranks=()), Case(ranks=(0, 0)), Case(pattern="base")),
    rows=((_SMALL, ("y", "x")),),
    wrong_case=Case(m=3, n=6, k=8, ranks=(2, 3), pattern="own"),
    wrong=(
        ({"x": torch.randn(3, 7)}, r"lora_a must be \(R, K\) = \(5, 7\), got \(5, 8\)"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.randn(4, 8), "y": torch.randn(4, 6)}, "rows must be as many as x has, 4, got 3"),
        ({"y": torch.randn(3, 7)}, r"y must be \(\.\.\., N\) = \(3, 6\), got \(3, 7\)"),
        ({"y": torch.randn(1, 6)}, r"y must be \(\.\.\., N\) = \(3, 6\), got \(1, 6\)"),
        ({"y": None}, "y must be a torch.Tensor, got NoneType"),
        ({"y": torch.randn(3, 6).double()}, r"y must have x's dtype \(torch.float32\), .* got torch.float64"),
        ({"y": torch.randn(3, 6, device="meta")}, r"y must be on the device of x \(cpu\), got meta"),
        ({"lora_a": torch.randn(4, 8)}, r"ranks must add up to lora_a's rows, 4, got 5 of \(2, 3\)"),
        ({"lora_a": [1.0]}, r"lora_a must be \(sum of ranks, K\), got list"),
        ({"lora_b": torch.randn(6, 4)}, r"lora_b must be \(N, R\) = \(6, 5\), got \(6, 4\)"),
        ({"lora_b": torch.randn(6, 5).double()}, "lora_b must have the dtype of lora_a"),
        ({"dropout_p": [0.5, math.nan]}, r"dropout_p must be in \[0, 1\), got nan"),
        ({"dropout_p": [0.5]}, "dropout_p must be one number, or 2, got 1"),
        ({"dropout_p": 0.5, "seed": 1.5}, "seed must be None, a 64-bit int"),
        ({"scale": [1.0, 2.0, 3.0]}, r"scale must be a float, or one for each slot, \(2,\), got 3"),
        ({"ranks": None}, "with rows, ranks must be a sequence of each slot's, got None"),
        ({"ranks": (2, 2, 1)}, "ranks must be one for each of the rows' 2 slots, got 3"),
        ({"rows": [0, 1, -1]}, "rows must be a Rows, as Rows.of makes it, got list"),
        ({"rows": pk.Rows.of([0, 1])}, "rows must be as many as x has, 3, got 2"),
    ),
    unsupported=(("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),)
    if "triton" in VARIANTS
    else (),
)

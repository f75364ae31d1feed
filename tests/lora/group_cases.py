"""Problems of the operator ``lora_group``, and what it owes; the contract sees its outputs side by side."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels.lora.group import op
from python_ref import lora as oracle
from tests.contract.draw import DTYPES, MATRIX_LAYOUTS, Draw, dtypes_name, laid_out
from tests.contract.operators import Operator, double

SEED = 20240229
VARIANTS = ("torch", "triton")
# What auto makes of small calls on a CPU: torch's own operators.
WITH_AUTO = (*VARIANTS, "auto")
PARTS = ("weight", "lora_a", "lora_b", "bias")


@dataclass(frozen=True)
class Case:
    """One problem of two or three members.

    Attributes:
        n, r: out-features and rank of each member.
        adapter_dtypes: of each member; None is ``dtype``.
        bias: whether the first and the last member have one.
        layout: how x lies in memory.
    """

    m: int = 37
    n: tuple[int, ...] = (40, 24, 9)
    k: int = 40
    r: tuple[int, ...] = (5, 16, 3)
    dtype: torch.dtype = torch.float32
    adapter_dtypes: tuple[torch.dtype | None, ...] = (None, None, None)
    p: float = 0.0
    bias: bool = True
    scale: float | Tensor = 0.75
    layout: str = "rows"

    @property
    def y_shape(self) -> tuple[int, int]:
        return self.m, sum(self.n)

    @property
    def y_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def scales(self) -> tuple[float | Tensor, ...]:
        """Each member's own."""
        return tuple(self.scale * (1 + j) for j in range(len(self.n)))

    def __str__(self) -> str:
        n, r = ("+".join(map(str, sizes)) for sizes in (self.n, self.r))
        dtypes = dtypes_name(self.dtype, *dict.fromkeys(self.adapter_dtypes))
        flags = f"{'-nobias' * (not self.bias)}{'-tensorscale' * isinstance(self.scale, Tensor)}"
        return f"{self.m}x({n})x{self.k}-r{r}-{dtypes}-p{self.p}-{self.layout}{flags}"


class Tensors(NamedTuple):
    x: Tensor
    weight_0: Tensor
    lora_a_0: Tensor
    lora_b_0: Tensor
    bias_0: Tensor | None
    weight_1: Tensor
    lora_a_1: Tensor
    lora_b_1: Tensor
    bias_1: Tensor | None
    weight_2: Tensor | None
    lora_a_2: Tensor | None
    lora_b_2: Tensor | None
    bias_2: Tensor | None


def members(tensors: Tensors, scales: Any) -> list[op.Member]:
    """The members that there are; scales are a sequence, or one for all."""
    found = []
    for j in range(3):
        weight, lora_a, lora_b, bias = (getattr(tensors, f"{part}_{j}") for part in PARTS)
        if weight is not None:
            scale = scales[j] if isinstance(scales, tuple) else scales
            found.append(op.Member(weight, lora_a, lora_b, scale, bias))
    return found


def lora_group(
    *, scale: Any = 1.0, dropout_p: Any = 0.0, seed: Any = None, backend: str | None = None, **tensors: Tensor
) -> Tensor:
    """The outputs side by side (..., sum of N_j)."""
    given = members(Tensors(**tensors), scale)
    ys = op.lora_group(tensors["x"], given, dropout_p=dropout_p, seed=seed, backend=backend)
    return torch.cat(ys, dim=-1)


def drawn(case: Case, device: torch.device, x: Tensor, *, of: Any) -> Tensors:
    """Parameters in the case's dtypes, each from ``of``, which has a function of a shape for each part; and x."""
    values: dict[str, Tensor | None] = {"x": laid_out(x.to(device, case.dtype), case.layout)}
    for j in range(3):
        is_there = j < len(case.n)
        n, r = (case.n[j], case.r[j]) if is_there else (0, 0)
        shapes = {"weight": (n, case.k), "lora_a": (r, case.k), "lora_b": (n, r), "bias": (n,)}
        for part, shape in shapes.items():
            dtype = case.dtype
            if is_there and part in ("lora_a", "lora_b"):
                dtype = case.adapter_dtypes[j] or dtype
            missing = not is_there or (part == "bias" and not (case.bias and j != 1))
            values[f"{part}_{j}"] = None if missing else of[part](*shape).to(device, dtype)
    return Tensors(**values)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; a low-rank term is about as large as its base product."""
    draw = Draw(seed)
    return drawn(
        case,
        device,
        draw.normal(case.m, case.k),
        of={
            "weight": lambda n, k: draw.normal(n, k, std=k**-0.5),
            "lora_a": lambda r, k: draw.normal(r, k, std=k**-0.5),
            "lora_b": lambda n, r: draw.normal(n, r, std=r**-0.5),
            "bias": draw.normal,
        },
    )


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient.

    As lora_linear's: a row of x and of the gradient holds a single 1 or -1.
    """
    draw = Draw(seed)
    x = draw.single_signs(case.m, case.k)
    of = dict.fromkeys(PARTS, lambda *shape: draw.integers(1, *shape))
    dy = draw.single_signs(case.m, sum(case.n))
    return drawn(case, device, x, of=of), dy.to(device, case.dtype)


def masks(case: Case, device: torch.device) -> list[Tensor | None]:
    """Each member's, from the oracle's own recipe."""
    if not case.p:
        return [None] * len(case.n)
    return [oracle.dropout_mask(SEED, case.m, case.k, case.p, lane=j).to(device) for j in range(len(case.n))]


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    return {**tensors._asdict(), "scale": case.scales, "dropout_p": case.p, "seed": SEED}


def of_oracle(case: Case, tensors: Tensors) -> list[oracle.Member]:
    found = zip(members(tensors, case.scales), masks(case, tensors.x.device), strict=True)
    return [oracle.Member(*member, mask, case.p) for member, mask in found]


def _eager(case: Case, tensors: Tensors) -> Tensor:
    return torch.cat(oracle.eager_group(tensors.x, of_oracle(case, tensors)), dim=-1)


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, Tensors]:
    wide = double(tensors)
    given = of_oracle(case, wide)
    y = torch.cat(oracle.group_forward(wide.x, given), dim=-1)
    dx, found = oracle.group_backward(dy.double().split(case.n, dim=-1), wide.x, given)
    gradients = {"x": dx}
    for j, each in enumerate(found):
        gradients |= {f"{part}_{j}": getattr(each, part) for part in PARTS}
    return y, Tensors(**{name: gradients.get(name) for name in Tensors._fields})


# Shapes: ragged in every size; aligned, with several tiles; one token; ranks beyond a block; two members.
SHAPES = (
    Case(m=37, n=(35, 8, 21), k=50, r=(5, 3, 17)),
    Case(m=140, n=(136, 72, 72), k=136, r=(16, 16, 16)),
    Case(m=1, n=(40, 24, 8), k=136, r=(32, 8, 16)),
    Case(m=40, n=(24, 40), k=72, r=(33, 33)),
    Case(m=12, n=(40, 16), k=264, r=(130, 4)),
)
MIXED = (torch.float32, None, torch.float32)

GRID = (
    *(
        replace(shape, dtype=dtype, adapter_dtypes=(adapter,) * 3, p=p, bias=index % 2 == 0)
        for index, shape in enumerate(SHAPES)
        for dtype, adapter in DTYPES
        for p in (0.0, 0.3)
    ),
    *(Case(dtype=torch.bfloat16, adapter_dtypes=MIXED, p=p) for p in (0.0, 0.3)),
    Case(layout="columns"),
    Case(layout="strided", dtype=torch.bfloat16, adapter_dtypes=(torch.float32,) * 3, p=0.3),
    Case(layout="expanded", dtype=torch.bfloat16),
    # Few rows and a long reduction: K is split between programs, whose partial sums are added afterwards.
    Case(m=9, n=(24, 8), k=1100, r=(5, 20)),
    Case(m=9, n=(24, 8), k=1100, r=(5, 20), dtype=torch.bfloat16, adapter_dtypes=(torch.float32,) * 2, p=0.3),
    Case(scale=-3.0, bias=False),
    Case(scale=0.0),
)

_SMALL = Case(m=4, n=(16, 8), k=16, r=(4, 2), adapter_dtypes=(None, None))

OPERATOR = Operator(
    function=lora_group,
    op=op,
    differentiable=Tensors._fields,
    variants=WITH_AUTO,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=_eager,
    oracle=_oracle,
    # S, whose errors reach most results, has m r values of each member.
    draws=lambda case: min(16, 256 // (case.m * min(case.r))),
    budget=(
        *itertools.product(GRID, VARIANTS),
        *((case, "auto") for case in GRID if not any(case.adapter_dtypes)),
    ),
    exact=st.builds(
        lambda dtype, adapters, n, r, **rest: Case(dtype=dtype, adapter_dtypes=adapters, n=n, r=r, scale=0.5, **rest),
        m=st.integers(1, 40),
        k=st.integers(1, 40),
        n=st.tuples(*[st.integers(1, 40)] * 3),
        r=st.tuples(*[st.integers(1, 40)] * 3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        adapters=st.tuples(*[st.sampled_from([None, torch.float32])] * 3),
        p=st.sampled_from([0.0, 0.5]),
        bias=st.booleans(),
        layout=st.sampled_from(MATRIX_LAYOUTS),
    ),
    exact_draws=40,
    exact_examples=(
        Case(p=0.5, scale=0.5),
        Case(2, (1, 1), 1, (1, 1), scale=0.5),
        Case(1, (1, 2), 1, (1, 1), torch.bfloat16, MIXED[:2], p=0.5, bias=False, scale=0.5),
    ),
    repeated=tuple(
        (Case(m=260, n=(72, 24), k=72, r=(8, 20), dtype=dtype, adapter_dtypes=(adapter,) * 2, p=p), variant)
        for dtype, adapter in (DTYPES[0], DTYPES[3])
        for p in (0.0, 0.3)
        for variant in VARIANTS
    ),
    # S is one matrix for all members.
    together=(("x",), *(tuple(f"{part}_{j}" for j in range(3)) for part in PARTS)),
    typical=Case(p=0.3, r=(40, 5, 3)),
    kinds=tuple(replace(_SMALL, p=p, scale=scale) for p in (0.0, 0.3) for scale in (0.5, torch.tensor(0.5))),
    gradcheck=tuple(Case(m=4, n=(4, 3), k=5, r=(2, 1), dtype=torch.float64, p=p) for p in (0.0, 0.3)),
    far=(replace(_SMALL, dtype=torch.bfloat16), ("x",)),
    empty=(Case(m=0), Case(n=(8, 0, 3), bias=False)),
    rows=((_SMALL, ("x",)),),
    wrong_case=Case(m=3, n=(6, 4), k=8, r=(2, 3), bias=False),
    wrong=(
        ({"x": torch.randn(3, 7)}, r"members\[0\].weight must be \(N, K\) = \(6, 7\), got \(6, 8\)"),
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., K\), got a 0-d"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must have one of the dtypes .*got torch.int64"),
        ({"weight_1": torch.randn(4, 7)}, r"members\[1\].weight must be \(N, K\) = \(4, 8\), got \(4, 7\)"),
        ({"weight_1": torch.randn(4, 8).bfloat16()}, r"members\[1\].weight must have the dtype of x"),
        ({"weight_1": torch.randn(4, 8, device="meta")}, r"members\[1\].weight must be on the device of x .*got meta"),
        ({"lora_a_1": torch.randn(3, 7)}, r"members\[1\].lora_a must be \(r, K\) = \(3, 8\), got \(3, 7\)"),
        ({"lora_a_1": torch.randn(0, 8), "lora_b_1": torch.randn(4, 0)}, r"members\[1\].lora_a .*r >= 1, got rank 0"),
        ({"lora_b_1": torch.randn(5, 3)}, r"members\[1\].lora_b must be \(N, r\) = \(4, 3\), got \(5, 3\)"),
        ({"lora_b_0": torch.randn(6, 2).double()}, r"members\[0\].lora_b must have the dtype of lora_a"),
        ({"bias_1": torch.randn(5)}, r"members\[1\].bias must be \(N,\) = \(4,\), got \(5,\)"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": math.nan}, r"dropout_p must be in \[0, 1\), got nan"),
        ({"dropout_p": (0.1,)}, "dropout_p must be one number, or 2, as there are members, got 1"),
        ({"dropout_p": 0.5, "seed": 1.5}, "seed must be None, a 64-bit int"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, "seed must be a 0-d int64 tensor"),
        ({"scale": torch.ones(2)}, r"members\[0\].scale must be a float or a 0-d floating tensor"),
        ({"scale": (0.5, "1")}, r"members\[1\].scale must be a float or a 0-d floating tensor, got str"),
    ),
    unsupported=(
        ("cuda", Case(), r"'cuda' cannot run this problem: members\[0\]: CUDA kernels run on CUDA tensors"),
        ("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
    ),
)

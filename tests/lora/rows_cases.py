"""Problems of the operator ``lora_rows``, and what it owes, by way of ``lora_linear(rows=)``."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import peft_kernels as pk
from peft_kernels.lora.rows import op
from python_ref import lora as oracle
from tests.contract.draw import DTYPES, MATRIX_LAYOUTS, Draw, dtypes_name, laid_out
from tests.contract.operators import Operator, double

SEED = 20240229
VARIANTS = tuple(each.name for each in op.OPERATOR.implementations if each.name in ("torch", "triton"))
PATTERNS = ("sorted", "shuffled", "own", "base", "one")


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        ranks: of each slot.
        pattern: of the rows' slots: "sorted", base rows last; "shuffled"; "own", one after the other; "base" alone;
            all of slot "one", the last.
        p: of slot 0; the next ones have half of it, nothing, and again.
        layout: how x lies in memory.
    """

    m: int = 37
    n: int = 40
    k: int = 40
    ranks: tuple[int, ...] = (5, 16, 0, 3)
    pattern: str = "shuffled"
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

    @property
    def scales(self) -> list[float] | Tensor:
        """Each slot's own, powers of two apart."""
        scales = [2.0 ** (t % 3) for t in range(len(self.ranks))]
        if isinstance(self.scale, Tensor):
            return self.scale * torch.tensor(scales, device="cpu")
        return [self.scale * each for each in scales]

    @property
    def ps(self) -> list[float]:
        return [(self.p, self.p / 2, 0.0)[t % 3] for t in range(len(self.ranks))]

    @property
    def slot(self) -> list[int]:
        """Of each row."""
        count = len(self.ranks)
        if self.pattern in ("base", "one"):
            return [-1 if self.pattern == "base" else count - 1] * self.m
        if self.pattern == "own":
            return [row % (count + 1) - 1 for row in range(self.m)]
        slots = [row * (count + 1) // max(1, self.m) for row in range(self.m)]
        slots = [slot if slot < count else -1 for slot in slots]
        if self.pattern == "sorted":
            return slots
        places = torch.randperm(self.m, generator=torch.Generator().manual_seed(self.m)).tolist()
        return [slots[place] for place in places]

    def __str__(self) -> str:
        ranks = "+".join(map(str, self.ranks))
        flags = f"{'-nobias' * (not self.bias)}{'-tensorscale' * isinstance(self.scale, Tensor)}"
        dtypes = dtypes_name(self.dtype, self.adapter_dtype)
        return f"{self.m}x{self.n}x{self.k}-r{ranks}-{self.pattern}-{dtypes}-p{self.p}-{self.layout}{flags}"


class Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None


def lora_rows(*, backend: str | None = None, **arguments: Any) -> Tensor:
    """As users call it."""
    return pk.lora_linear(**arguments, backend=backend)


def drawn(case: Case, device: torch.device, x: Tensor, *, of: Any) -> Tensors:
    """Parameters in the case's dtypes, each from ``of``, which has a function of a shape for each; and x."""
    r, adapter = sum(case.ranks), case.adapter_dtype or case.dtype
    return Tensors(
        laid_out(x.to(device, case.dtype), case.layout),
        of["weight"](case.n, case.k).to(device, case.dtype),
        of["lora_a"](r, case.k).to(device, adapter),
        of["lora_b"](case.n, r).to(device, adapter),
        of["bias"](case.n).to(device, case.dtype) if case.bias else None,
    )


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; a low-rank term is about as large as its base product."""
    draw = Draw(seed)
    rank = max(1, max(case.ranks, default=1))
    return drawn(
        case,
        device,
        draw.normal(case.m, case.k),
        of={
            "weight": lambda n, k: draw.normal(n, k, std=k**-0.5),
            "lora_a": lambda r, k: draw.normal(r, k, std=k**-0.5),
            "lora_b": lambda n, r: draw.normal(n, r, std=rank**-0.5),
            "bias": draw.normal,
        },
    )


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient.

    As lora_linear's: a row of x and of the gradient holds a single 1 or -1.
    """
    draw = Draw(seed)
    x = draw.single_signs(case.m, case.k)
    of = dict.fromkeys(("weight", "lora_a", "lora_b", "bias"), lambda *shape: draw.integers(1, *shape))
    dy = draw.single_signs(case.m, case.n)
    return drawn(case, device, x, of=of), dy.to(device, case.dtype)


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    rows = pk.Rows.of(case.slot, known=len(case.ranks), device=tensors.x.device)
    facts = {"rows": rows, "ranks": case.ranks, "dropout_p": case.ps, "seed": SEED}
    return {**tensors._asdict(), "scale": case.scales, **facts}


def slots(case: Case, tensors: Tensors) -> list[oracle.Slot]:
    """The adapters, with masks from the oracle's own recipe."""
    found = []
    factors = zip(tensors.lora_a.split(case.ranks), tensors.lora_b.split(case.ranks, dim=1), strict=True)
    for t, (lora_a, lora_b) in enumerate(factors):
        p = case.ps[t]
        mask = oracle.dropout_mask(SEED, case.m, case.k, p).to(lora_a.device) if p else None
        found.append(oracle.Slot(lora_a, lora_b, case.scales[t], mask, p))
    return found


def _eager(case: Case, tensors: Tensors) -> Tensor:
    return oracle.eager_rows(tensors.x, tensors.weight, slots(case, tensors), case.slot, tensors.bias)


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, Tensors]:
    wide = double(tensors)
    of_slots = slots(case, wide)
    y = oracle.rows_forward(wide.x, wide.weight, of_slots, case.slot, wide.bias)
    found = oracle.rows_backward(dy.double(), wide.x, wide.weight, of_slots, case.slot)
    # The factors of no slot at all have no elements.
    da, db = torch.cat([wide.lora_a[:0], *found.lora_a]), torch.cat([wide.lora_b[:, :0], *found.lora_b], dim=1)
    return y, Tensors(found.x, found.weight, da, db, found.bias)


def _plan_bytes(case: Case) -> int:
    """Of the rows' plan, and of the slots' table and scales, which a layer shares with those that are like it."""
    rows = pk.Rows.of(case.slot, known=len(case.ranks))
    plan = (rows.slot, rows.order, rows.first, rows.runs)
    return sum(each.nbytes for each in plan if each is not None) + 4 * 4 * len(case.ranks)


# Ragged in every size; aligned, with several tiles of a slot; one token; ranks beyond a block, and none; many slots.
SHAPES = (
    Case(m=37, n=35, k=50, ranks=(5, 3, 0, 17)),
    Case(m=280, n=136, k=136, ranks=(16, 16), pattern="sorted"),
    Case(m=1, n=40, k=136, ranks=(32,), pattern="one"),
    Case(m=40, n=24, k=72, ranks=(33, 1, 70), pattern="own"),
    Case(m=33, n=40, k=264, ranks=(140, 4), pattern="sorted"),
    Case(m=64, n=24, k=40, ranks=(4,) * 20),
)

GRID = (
    *(
        replace(shape, dtype=dtype, adapter_dtype=adapter, p=p, bias=index % 2 == 0)
        for index, shape in enumerate(SHAPES)
        for dtype, adapter in DTYPES
        for p in (0.0, 0.3)
    ),
    *(Case(pattern=pattern, p=p) for pattern in PATTERNS if pattern != "base" for p in (0.0, 0.3)),
    Case(layout="columns"),
    Case(layout="strided", dtype=torch.bfloat16, adapter_dtype=torch.float32, p=0.3),
    Case(layout="expanded", dtype=torch.bfloat16),
    Case(m=9, n=24, k=1100, ranks=(5, 20)),
    Case(scale=-3.0, bias=False),
    Case(scale=0.0),
)

_SMALL = Case(m=6, n=16, k=16, ranks=(4, 2), pattern="own")

OPERATOR = Operator(
    function=lora_rows,
    op=op,
    differentiable=Tensors._fields,
    variants=VARIANTS,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=_eager,
    oracle=_oracle,
    # S, whose errors reach most results, has a value for each rank of a row's adapter.
    draws=lambda case: min(16, 256 // max(1, case.m)),
    # The interpreter takes long, and test_rows_triton.py has problems of the kernels' own.
    budget=tuple((case, name) for name in VARIANTS for case in (GRID if name == "torch" else GRID[::3])),
    exact=st.builds(
        lambda ranks, p, **rest: Case(ranks=tuple(ranks), p=p, scale=0.5, **rest),
        m=st.integers(1, 40),
        k=st.integers(1, 40),
        n=st.integers(1, 40),
        ranks=st.lists(st.one_of(st.integers(0, 40), st.just(140)), min_size=1, max_size=7),
        pattern=st.sampled_from(PATTERNS),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        adapter_dtype=st.sampled_from([None, torch.float32]),
        p=st.just(0.0),
        bias=st.booleans(),
        layout=st.sampled_from(MATRIX_LAYOUTS),
    ),
    exact_draws=12,
    exact_examples=(
        Case(scale=0.5),
        Case(2, 1, 1, (1, 1), pattern="own", scale=0.5),
        Case(1, 2, 1, (1,), "one", torch.bfloat16, torch.float32, bias=False, scale=0.5),
    ),
    repeated=tuple(
        (Case(m=260, n=72, k=72, ranks=(8, 20), dtype=dtype, adapter_dtype=adapter, p=p), variant)
        for dtype, adapter in (DTYPES[0], DTYPES[3])
        for p in (0.0, 0.3)
        for variant in VARIANTS
    ),
    shared=_plan_bytes,
    typical=Case(p=0.3, ranks=(40, 5, 3)),
    kinds=tuple(replace(_SMALL, p=p, scale=scale) for p in (0.0, 0.3) for scale in (0.5, torch.tensor(0.5))),
    gradcheck=tuple(Case(m=5, n=4, k=5, ranks=(2, 0, 1), dtype=torch.float64, p=p) for p in (0.0, 0.3)),
    far=(replace(_SMALL, dtype=torch.bfloat16), ("x",)),
    empty=(Case(m=0), Case(n=0, bias=False), Case(ranks=()), Case(ranks=(0, 0)), Case(pattern="base")),
    rows=((_SMALL, ("x",)),),
    wrong_case=Case(m=3, n=6, k=8, ranks=(2, 3), pattern="own", bias=False),
    wrong=(
        ({"x": torch.randn(3, 7)}, r"weight must be \(N, K\) = \(6, 7\), got \(6, 8\)"),
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., K\), got a 0-d"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must have one of the dtypes .*got torch.int64"),
        ({"x": torch.randn(4, 8)}, "rows must be as many as x has, 4, got 3"),
        ({"weight": torch.randn(6, 8).bfloat16()}, "weight must have the dtype of x"),
        ({"weight": torch.randn(6, 8, device="meta")}, "weight must be on the device of x .*got meta"),
        ({"lora_a": torch.randn(5, 7)}, r"lora_a must be \(R, K\) = \(5, 8\), got \(5, 7\)"),
        ({"lora_a": torch.randn(4, 8)}, r"ranks must add up to lora_a's rows, 4, got 5 of \(2, 3\)"),
        ({"lora_a": [1.0]}, r"lora_a must be \(sum of ranks, K\), got list"),
        ({"lora_b": torch.randn(6, 4)}, r"lora_b must be \(N, R\) = \(6, 5\), got \(6, 4\)"),
        ({"lora_b": torch.randn(6, 5).double()}, "lora_b must have the dtype of lora_a"),
        ({"bias": torch.randn(5)}, r"bias must be \(N,\) = \(6,\), got \(5,\)"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": [0.5, math.nan]}, r"dropout_p must be in \[0, 1\), got nan"),
        ({"dropout_p": [0.5]}, "dropout_p must be one number, or 2, got 1"),
        ({"dropout_p": 0.5, "seed": 1.5}, "seed must be None, a 64-bit int"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, "seed must be a 0-d int64 tensor"),
        ({"scale": torch.ones(3)}, r"scale must be a float, or a floating one for each slot, \(2,\), got"),
        ({"scale": [1.0, 2.0, 3.0]}, r"scale must be a float, or one for each slot, \(2,\), got 3"),
        ({"scale": "1"}, "scale must be a float or a 0-d floating tensor, got str"),
        ({"ranks": (-1, 6)}, "with rows, ranks must be a sequence of ints of at least 0"),
        ({"ranks": None}, "with rows, ranks must be a sequence of each slot's, got None"),
        ({"ranks": (2, 2, 1)}, "ranks must be one for each of the rows' 2 slots, got 3"),
        ({"rows": [0, 1, -1]}, "rows must be a Rows, as Rows.of makes it, got list"),
        ({"rows": pk.Rows.of([0, 1])}, "rows must be as many as x has, 3, got 2"),
    ),
    unsupported=(("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),)
    if "triton" in VARIANTS
    else (),
)

"""Problems of the operator ``adapter_rows``, and what it owes."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels import Rows
from peft_kernels.adapter import bottleneck_adapter
from peft_kernels.adapter.rows import op
from python_ref import adapter as oracle
from tests.adapter.cases import ACTIVATIONS, RESIDUALS
from tests.contract.draw import DTYPES, MATRIX_LAYOUTS, Draw, dtypes_name, laid_out
from tests.contract.operators import Operator, double

VARIANTS = ("torch", "triton")


@dataclass(frozen=True)
class Case:
    """One problem; n counts only where the residual is not x.

    Attributes:
        ranks: of each slot.
        order: how slots come: "shuffled", "full" without rows of none, "sorted" as in a split batch, "base" without
            any, "alone": slot 0 for all.
        is_hidden: whether the host does not know the rows.
        layout: how x and the residual lie in memory.
    """

    m: int = 37
    n: int = 48
    k: int = 40
    ranks: tuple[int, ...] = (5, 20, 8)
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    activation: str = "relu"
    residual: str = "x"
    down_bias: bool = True
    up_bias: bool = True
    order: str = "shuffled"
    is_hidden: bool = False
    scale: float | Tensor = 0.75
    layout: str = "rows"

    @property
    def out(self) -> int:
        """Width of y."""
        return self.k if self.residual == "x" else self.n

    @property
    def y_shape(self) -> tuple[int, int]:
        return self.m, self.out

    @property
    def y_dtype(self) -> torch.dtype:
        return torch.float32 if self.residual == "wide" else self.dtype

    @property
    def scales(self) -> list[float]:
        """Each slot's own; a power of two of the case's."""
        return [float(self.scale) * 2**t for t in range(len(self.ranks))]

    @property
    def slot(self) -> list[int]:
        """Of each row; some have none. By arithmetic, which a compiler that traces the yardstick sees through."""
        slots = len(self.ranks)
        if self.order in ("base", "alone"):
            return [-1 if self.order == "base" else 0] * self.m
        if self.order == "full":
            return [row * 5 // 3 % slots for row in range(self.m)]
        mixed = [row * 5 // 3 % (slots + 1) - 1 for row in range(self.m)]
        return sorted(mixed) if self.order == "sorted" else mixed

    def __str__(self) -> str:
        biases = f"{'d' * self.down_bias}{'u' * self.up_bias}" or "nobias"
        ranks = "+".join(map(str, self.ranks))
        return (
            f"{self.m}x{self.out}x{self.k}-r({ranks})-{dtypes_name(self.dtype, self.adapter_dtype)}-{self.activation}"
            f"-{self.residual}-{biases}-{self.order}{'-hidden' * self.is_hidden}-{self.layout}"
            f"{'-tensorscale' * isinstance(self.scale, Tensor)}"
        )


class Tensors(NamedTuple):
    """``residual`` is None where it is x. The plan is made once, as for a model, and not within what is traced."""

    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    residual: Tensor | None
    slot: Tensor | None = None
    order: Tensor | None = None
    first: Tensor | None = None
    runs: Tensor | None = None


PLAN = ("slot", "order", "first", "runs")
DIFFERENTIABLE = Tensors._fields[:6]


def adapter_rows(*, backend: str | None = None, **arguments: Any) -> Tensor:
    """``bottleneck_adapter`` with rows."""
    return bottleneck_adapter(**arguments, backend=backend)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; a branch is about as large as the residual."""
    draw, total = Draw(seed), sum(case.ranks)
    narrow = [draw.normal(case.out, rank, std=max(1, rank) ** -0.5) for rank in case.ranks]
    drawn = Tensors(
        x=draw.normal(case.m, case.k),
        down_weight=draw.normal(total, case.k, std=case.k**-0.5),
        up_weight=torch.cat(narrow, dim=1),
        down_bias=draw.normal(total),
        up_bias=draw.normal(len(case.ranks), case.out),
        residual=draw.normal(case.m, case.out),
    )
    return _as_asked(case, drawn, device)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, as ``bottleneck_adapter``'s."""
    draw, total = Draw(seed), sum(case.ranks)
    drawn = Tensors(
        x=draw.single_signs(case.m, case.k),
        down_weight=draw.integers(1, total, case.k),
        up_weight=draw.integers(1, case.out, total),
        down_bias=draw.integers(1, total),
        up_bias=draw.integers(1, len(case.ranks), case.out),
        residual=draw.integers(1, case.m, case.out),
    )
    return _as_asked(case, drawn, device), draw.single_signs(case.m, case.out).to(device, case.y_dtype)


def _as_asked(case: Case, drawn: Tensors, device: torch.device) -> Tensors:
    """Put float64 tensors on the device in the case's dtypes, and x and the residual in its layout."""
    adapter, has_residual = case.adapter_dtype or case.dtype, case.residual in ("tensor", "wide")
    rows = Rows.of(case.slot, known=len(case.ranks), device=device)
    return Tensors(
        x=laid_out(drawn.x.to(device, case.dtype), case.layout),
        down_weight=drawn.down_weight.to(device, adapter),
        up_weight=drawn.up_weight.to(device, adapter),
        down_bias=drawn.down_bias.to(device, adapter) if case.down_bias else None,
        up_bias=drawn.up_bias.to(device, adapter) if case.up_bias else None,
        residual=laid_out(drawn.residual.to(device, case.y_dtype), case.layout) if has_residual else None,
        slot=rows.slot,
        order=rows.order,
        first=rows.first,
        runs=None if case.is_hidden else rows.runs,
    )


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    given = tensors._replace(residual=_residual(case, tensors))._asdict()
    slot, order, first, runs = (given.pop(name) for name in PLAN)
    scale = case.scales
    if isinstance(case.scale, Tensor):
        scale = torch.stack([case.scale * 2**t for t in range(len(case.ranks))])
    # Of what has no values the host knows none.
    rows = Rows(slot, order, first, None if slot.device.type == "meta" else runs)
    return {**given, "activation": case.activation, "scale": scale, "rows": rows, "ranks": case.ranks}


def _residual(case: Case, tensors: Tensors) -> Tensor | None:
    return tensors.x if case.residual == "x" else tensors.residual


def slots_of(case: Case, tensors: Tensors) -> list[oracle.Slot]:
    """Each slot's own weights."""
    ends = list(itertools.accumulate(case.ranks))
    return [
        oracle.Slot(
            tensors.down_weight[end - rank : end],
            tensors.up_weight[:, end - rank : end],
            None if tensors.down_bias is None else tensors.down_bias[end - rank : end],
            None if tensors.up_bias is None else tensors.up_bias[t],
            scale,
        )
        for t, (rank, end, scale) in enumerate(zip(case.ranks, ends, case.scales, strict=True))
    ]


def known_slot(case: Case) -> list[int]:
    """Of each row; a slot of rank 0 is none."""
    return [t if t >= 0 and case.ranks[t] else -1 for t in case.slot]


def _eager(case: Case, tensors: Tensors) -> Tensor:
    given = slots_of(case, tensors), known_slot(case), _residual(case, tensors), case.activation
    return oracle.eager_rows(tensors.x, *given)


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, Tensors]:
    wide = double(Tensors(*tensors[:6]))
    given = wide.x, slots_of(case, wide), known_slot(case)
    y = oracle.rows_forward(*given, _residual(case, wide), case.activation)
    found = oracle.rows_backward(dy.double(), *given, case.residual == "x", case.activation)
    return y, Tensors(
        found.x,
        torch.cat(found.down_weight),
        torch.cat(found.up_weight, dim=1),
        torch.cat(found.down_bias),
        torch.stack(found.up_bias),
        found.residual,
    )


# Shapes: ragged in every size, with an absent adapter; more slots than rows of some; several tiles; one row.
SHAPES = (
    Case(m=37, n=35, k=50, ranks=(5, 0, 17)),
    Case(m=24, n=40, k=72, ranks=(33, 8, 8, 3, 16, 1, 8)),
    Case(m=150, n=136, k=136, ranks=(16, 24)),
    Case(m=1, n=72, k=136, ranks=(16,), order="alone"),
    Case(m=20, n=140, k=72, ranks=(128, 8)),
)


def _varied(index: int, case: Case) -> Case:
    """Activations, residuals, biases and orders take turns."""
    return replace(
        case,
        activation=ACTIVATIONS[index % len(ACTIVATIONS)],
        residual=RESIDUALS[(index + index // 5) % 4],
        down_bias=index % 3 != 0,
        up_bias=index % 4 != 0,
        order=case.order if index % 2 or case.m == 1 else "sorted",
    )


GRID = (
    *(
        _varied(index, replace(shape, dtype=dtype, adapter_dtype=adapter))
        for index, (shape, (dtype, adapter)) in enumerate(itertools.product(SHAPES, DTYPES))
    ),
    *(Case(m=24, activation=activation, residual="none") for activation in ACTIVATIONS),
    *(Case(residual=residual, is_hidden=True) for residual in RESIDUALS if residual != "wide"),
    Case(residual="wide", dtype=torch.bfloat16, is_hidden=True),
    Case(layout="columns"),
    Case(layout="strided", residual="tensor", dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(layout="expanded", residual="tensor"),
    Case(scale=-3.0, down_bias=False, up_bias=False),
)

_SMALL = Case(m=6, n=24, k=16, ranks=(4, 2), residual="tensor")


def _kind(residual: str, scale: float | Tensor) -> Case:
    dtype = torch.bfloat16 if residual == "wide" else torch.float32
    return replace(_SMALL, residual=residual, dtype=dtype, activation="silu", scale=scale)


OPERATOR = Operator(
    function=adapter_rows,
    op=op,
    differentiable=DIFFERENTIABLE,
    variants=VARIANTS,
    pin=contextlib.nullcontext,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=_eager,
    oracle=_oracle,
    # The narrowest bottleneck's bias, whose gradient has all other errors in it.
    draws=lambda case: min(8, 240 // sum(case.ranks)),
    # The interpreter takes long.
    budget=tuple((case, name) for name in VARIANTS for case in (GRID if name == "torch" else GRID[::3])),
    exact=st.builds(
        lambda dtypes, **rest: Case(dtype=dtypes[0], adapter_dtype=dtypes[1], scale=0.5, **rest),
        **{size: st.integers(1, 40) for size in "mnk"},
        ranks=st.lists(st.integers(0, 20), min_size=1, max_size=5).map(tuple),
        dtypes=st.sampled_from(DTYPES),
        activation=st.sampled_from(["relu", "identity"]),
        residual=st.sampled_from(RESIDUALS),
        down_bias=st.booleans(),
        up_bias=st.booleans(),
        order=st.sampled_from(["shuffled", "sorted", "base", "alone"]),
        is_hidden=st.booleans(),
        layout=st.sampled_from(MATRIX_LAYOUTS),
    ),
    exact_draws=12,
    exact_examples=(
        Case(residual="tensor", scale=0.5),
        Case(m=1, n=1, k=1, ranks=(1,), order="alone", scale=0.5),
        Case(2, 1, 1, (1, 0, 1), *DTYPES[3], "identity", "wide", down_bias=False, up_bias=False, scale=0.5),
    ),
    repeated=tuple(
        (Case(m=m, k=k, dtype=dtype, adapter_dtype=adapter, activation="gelu"), variant)
        for m, k in ((5, 600), (260, 136))
        for dtype, adapter in (DTYPES[0], DTYPES[3])
        for variant in VARIANTS
    ),
    # z is as wide for each row as the widest slot.
    typical=Case(ranks=(8, 8, 8), residual="tensor", activation="silu", order="full"),
    # The first has one slot: by operations that torch sees into, each slot takes the rows of all.
    kinds=(
        replace(_SMALL, ranks=(4,), order="full", residual="none", activation="silu"),
        *(_kind(residual, scale) for residual in RESIDUALS for scale in (0.5, torch.tensor(0.5))),
    ),
    # What numbers the slots: a table and scales, made once for a model.
    shared=lambda case: 3 * 4 * 3,
    gradcheck=tuple(
        Case(m=6, n=4, k=5, ranks=(3, 0, 2), dtype=torch.float64, residual=residual, activation=activation)
        for activation in ("gelu", "sigmoid")
        for residual in ("none", "x", "tensor")
    ),
    far=(replace(_SMALL, dtype=torch.bfloat16), ("x", "residual")),
    empty=(
        Case(m=0),
        Case(m=0, residual="wide", dtype=torch.bfloat16),
        Case(n=0, residual="none"),
        Case(ranks=(0, 0)),
    ),
    rows=((replace(_SMALL, residual="x"), ("x",)), (_SMALL, ("x", "residual"))),
    wrong_case=Case(m=3, n=6, k=8, ranks=(2, 3), residual="none", down_bias=False, up_bias=False),
    wrong=(
        ({"x": torch.randn(3, 7)}, r"down_weight must be \(R, K\) = \(5, 7\), got \(5, 8\)"),
        ({"x": torch.randn(4, 8)}, "rows must be as many as x has, 4, got 3"),
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., K\), got a 0-d"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must have one of the dtypes .*got torch.int64"),
        ({"down_weight": torch.randn(8)}, r"down_weight must be \(sum of ranks, K\), got \(8,\)"),
        ({"down_weight": torch.randn(5, 8).bfloat16()}, "down_weight must have the dtype of x, or float32"),
        ({"ranks": (2, 2)}, r"ranks must add up to down_weight's rows, 5, got 4 of \(2, 2\)"),
        ({"ranks": (5,)}, "ranks must be of the rows' 2 slots, got 1"),
        ({"ranks": (6, -1)}, "with rows, ranks must be a sequence of ints of at least 0"),
        ({"ranks": None}, "with rows, ranks must be a sequence of ints of at least 0, got None"),
        ({"rows": [0, 1, 0]}, "rows must be a Rows, as Rows.of makes it, got list"),
        ({"up_weight": torch.randn(6, 3)}, r"up_weight must be \(N, R\) = \(6, 5\), got \(6, 3\)"),
        ({"up_weight": torch.randn(6, 5).double()}, "up_weight must have the dtype of down_weight"),
        ({"down_bias": torch.randn(3)}, r"down_bias must be \(R,\) = \(5,\), got \(3,\)"),
        ({"up_bias": torch.randn(6)}, r"up_bias must be \(T, N\) = \(2, 6\), got \(6,\)"),
        ({"up_bias": 1.0}, "up_bias must be a torch.Tensor, got float"),
        ({"residual": torch.randn(3, 8)}, r"residual must be \(\.\.\., N\).* = \(3, 6\), got \(3, 8\)"),
        ({"residual": torch.randn(3, 6).bfloat16()}, "residual must have the dtype of x, or float32"),
        ({"residual": torch.randn(3, 6, device="meta")}, r"residual must be on the device of x \(cpu\), got meta"),
        ({"activation": "swish"}, "activation must be one of relu, gelu, .*, got 'swish'"),
        ({"scale": (0.5,)}, r"scale must be a float, or one for each slot, \(2,\), got 1"),
        ({"scale": torch.ones(3)}, r"scale must be a float, or a floating one for each slot, \(2,\), got .*\(3,\)"),
        ({"scale": "1"}, "scale must be a float or a 0-d floating tensor, got str"),
    ),
    unsupported=(("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),),
)

"""Problems of the bottleneck adapter family, and what its operator owes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels.adapter import op
from peft_kernels.adapter.kernels import config
from python_ref import adapter as oracle
from tests.contract.draw import DTYPES, MATRIX_LAYOUTS, Draw, dtypes_name, laid_out
from tests.contract.operators import Operator, double

# Backend, and whether the Triton backend makes both products of a direction in one launch.
VARIANTS = ("torch", "triton-fused", "triton-split")
# What auto makes of small calls on a CPU: torch's own operators.
WITH_AUTO = (*VARIANTS, "auto")

# What is added to the branch: nothing, x itself, another tensor, another tensor in float32.
RESIDUALS = ("none", "x", "tensor", "wide")

ACTIVATIONS = tuple(oracle.ACTIVATIONS)


@dataclass(frozen=True)
class Case:
    """One problem; n counts only where the residual is not x. ``layout`` says how x and the residual lie in memory."""

    m: int = 37
    n: int = 72
    k: int = 40
    r: int = 20
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    activation: str = "relu"
    residual: str = "x"
    down_bias: bool = True
    up_bias: bool = True
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

    def __str__(self) -> str:
        biases = f"{'d' * self.down_bias}{'u' * self.up_bias}" or "nobias"
        return (
            f"{self.m}x{self.out}x{self.k}-r{self.r}-{dtypes_name(self.dtype, self.adapter_dtype)}-{self.activation}"
            f"-{self.residual}-{biases}-{self.layout}{'-tensorscale' * isinstance(self.scale, Tensor)}"
        )


class Tensors(NamedTuple):
    """``residual`` is None where it is x."""

    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    residual: Tensor | None


# Shapes: ragged in every size; several tiles of each kind; one token and a reduction that is split; widths below, at
# and above a block, and beyond one.
SHAPES = (
    Case(m=37, n=35, k=50, r=5),
    Case(m=140, n=264, k=136, r=16),
    Case(m=1, n=72, k=600, r=16),
    Case(m=70, n=40, k=72, r=33),
    Case(m=20, n=140, k=264, r=130),
    Case(m=20, n=140, k=72, r=128),
)


def _varied(index: int, case: Case) -> Case:
    """Activations, residuals and biases take turns, in steps that bring each together with every dtype and shape."""
    return replace(
        case,
        activation=ACTIVATIONS[index % len(ACTIVATIONS)],
        residual=RESIDUALS[(index + index // 5) % 4],
        down_bias=index % 3 != 0,
        up_bias=index % 4 != 0,
    )


def _in_each_dtype(case: Case) -> list[Case]:
    return [replace(case, dtype=dtype, adapter_dtype=adapter) for dtype, adapter in DTYPES]


GRID = (
    *(_varied(index, case) for index, case in enumerate(case for shape in SHAPES for case in _in_each_dtype(shape))),
    *(
        Case(m=16, k=24, r=24, activation=activation, residual="none", dtype=dtype, adapter_dtype=adapter)
        for activation in ACTIVATIONS
        for dtype, adapter in (DTYPES[0], DTYPES[1], DTYPES[4])
    ),
    *(case for residual in RESIDUALS for case in _in_each_dtype(Case(m=19, r=24, residual=residual))),
    Case(layout="columns"),
    Case(layout="columns", residual="tensor", dtype=torch.bfloat16),
    Case(layout="strided", residual="tensor", dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(layout="strided", dtype=torch.bfloat16),
    Case(layout="expanded", residual="tensor"),
    Case(m=9, r=520, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    Case(m=9, r=1024, dtype=torch.bfloat16, activation="gelu"),
    Case(scale=-3.0, down_bias=False, up_bias=False),
    Case(scale=0.0),
    # Many small terms beside a large residual.
    Case(m=5, n=3, k=64, r=130, residual="tensor", scale=1e-3),
)

# For the CUDA kernel, each with a cluster: clusters of every size, with rows that fill their 64 and that do not; widths
# below, at and above 64; chunks of columns that are full or not, several a CTA, or none; more stages of weights than
# there are tiles, and fewer.
_CUDA_SHAPES = (
    (Case(m=70, k=136, r=24, dtype=torch.bfloat16, residual="x"), 1),
    (Case(m=129, k=200, n=72, r=3, dtype=torch.float16, residual="tensor"), 2),
    (Case(m=64, k=64, n=600, r=64, dtype=torch.bfloat16, residual="tensor", up_bias=False), 4),
    (Case(m=1, k=520, r=1, dtype=torch.float16, residual="x"), 8),
    (Case(m=5, k=1032, n=200, r=128, dtype=torch.bfloat16, residual="none", down_bias=False), 8),
    (Case(m=63, k=264, r=65, dtype=torch.float16, residual="x"), 2),
    (Case(m=65, k=8, n=8, r=8, dtype=torch.bfloat16, residual="none"), 1),
    (Case(m=200, k=256, r=128, dtype=torch.float16, residual="x", scale=-3.0), 4),
    (Case(m=40, k=328, n=520, r=100, dtype=torch.bfloat16, residual="tensor", down_bias=False, up_bias=False), 1),
    (Case(m=66, k=192, r=16, dtype=torch.bfloat16, residual="x", layout="columns"), 2),
    (Case(m=66, k=128, n=192, r=16, dtype=torch.float16, residual="tensor", layout="strided"), 2),
)
CUDA_GRID = tuple(
    (replace(case, activation=ACTIVATIONS[index % len(ACTIVATIONS)]), cluster)
    for index, (case, cluster) in enumerate(_CUDA_SHAPES)
)


def make(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Draw fresh random tensors; the branch is about as large as the residual."""
    draw = Draw(seed)
    drawn = Tensors(
        x=draw.normal(case.m, case.k),
        down_weight=draw.normal(case.r, case.k, std=case.k**-0.5),
        up_weight=draw.normal(case.out, case.r, std=case.r**-0.5),
        down_bias=draw.normal(case.r),
        up_bias=draw.normal(case.out),
        residual=draw.normal(case.m, case.out),
    )
    return _as_asked(case, drawn, device)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient.

    Rows of x and of the gradient hold a single 1 or -1: z is at most 2, and no sum exceeds twice the width or the rows
    and two. The scale must be a power of two, the activation piecewise linear with whole slopes.
    """
    draw = Draw(seed)
    drawn = Tensors(
        x=draw.single_signs(case.m, case.k),
        down_weight=draw.integers(1, case.r, case.k),
        up_weight=draw.integers(1, case.out, case.r),
        down_bias=draw.integers(1, case.r),
        up_bias=draw.integers(1, case.out),
        residual=draw.integers(1, case.m, case.out),
    )
    return _as_asked(case, drawn, device), draw.single_signs(case.m, case.out).to(device, case.y_dtype)


def _as_asked(case: Case, drawn: Tensors, device: torch.device) -> Tensors:
    """Put float64 tensors on the device in the case's dtypes, and x and the residual in its layout."""
    adapter, has_residual = case.adapter_dtype or case.dtype, case.residual in ("tensor", "wide")
    return Tensors(
        x=laid_out(drawn.x.to(device, case.dtype), case.layout),
        down_weight=drawn.down_weight.to(device, adapter),
        up_weight=drawn.up_weight.to(device, adapter),
        down_bias=drawn.down_bias.to(device, adapter) if case.down_bias else None,
        up_bias=drawn.up_bias.to(device, adapter) if case.up_bias else None,
        residual=laid_out(drawn.residual.to(device, case.y_dtype), case.layout) if has_residual else None,
    )


@contextlib.contextmanager
def _pin(variant: str) -> Iterator[str]:
    """The path of the Triton backend; no GPU holds a width beyond the fused path's."""
    backend, _, path = variant.partition("-")

    def pinned(m: int, r: int, hardware: Hardware) -> config.Path:
        return "fused" if path == "fused" and r <= config.FUSED_LIMIT else "split"

    with mock.patch.object(config, "product_path", pinned) if path else contextlib.nullcontext():
        yield backend


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    residual = tensors.x if case.residual == "x" else tensors.residual
    return {**tensors._replace(residual=residual)._asdict(), "activation": case.activation, "scale": case.scale}


def _oracle(case: Case, tensors: Tensors, dy: Tensor) -> tuple[Tensor, oracle.Gradients]:
    given = arguments(case, double(tensors))
    y, _ = oracle.forward(**given)
    del given["up_bias"], given["residual"]
    return y, oracle.backward(dy.double(), **given, serial=case.residual == "x")


def _kind(residual: str, scale: float | Tensor) -> Case:
    dtype = torch.bfloat16 if residual == "wide" else torch.float32
    return Case(m=6, r=3, residual=residual, dtype=dtype, activation="silu", scale=scale)


_WITH_RESIDUAL = Case(m=4, n=24, k=16, r=4, residual="tensor")

OPERATOR = Operator(
    function=op.bottleneck_adapter,
    op=op,
    differentiable=Tensors._fields,
    variants=WITH_AUTO,
    pin=_pin,
    make=make,
    make_exact=make_exact,
    arguments=arguments,
    eager=lambda case, tensors: oracle.eager(**arguments(case, tensors)),
    oracle=_oracle,
    # The bottleneck's bias, whose gradient has all other errors in it, has r values.
    draws=lambda case: min(8, 60 // case.r),
    budget=(
        *itertools.product(GRID, VARIANTS),
        *((case, "auto") for case in GRID if case.residual != "wide" and case.adapter_dtype is None),
    ),
    exact=st.builds(
        lambda dtypes, **rest: Case(dtype=dtypes[0], adapter_dtype=dtypes[1], scale=0.5, **rest),
        **{size: st.integers(1, 40) for size in "mnkr"},
        dtypes=st.sampled_from(DTYPES),
        activation=st.sampled_from(["relu", "identity"]),
        residual=st.sampled_from(RESIDUALS),
        down_bias=st.booleans(),
        up_bias=st.booleans(),
        layout=st.sampled_from(MATRIX_LAYOUTS),
    ),
    exact_draws=50,
    exact_examples=(
        Case(residual="tensor", scale=0.5),
        Case(1, 1, 1, 1, scale=0.5),
        Case(2, 1, 1, 1, *DTYPES[3], "identity", "wide", down_bias=False, up_bias=False, scale=0.5),
    ),
    repeated=tuple(
        (Case(m=m, k=k, r=8, dtype=dtype, adapter_dtype=adapter, activation="gelu"), variant)
        for m, k in ((5, 600), (260, 136))
        for dtype, adapter in (DTYPES[0], DTYPES[3])
        for variant in WITH_AUTO
    ),
    typical=Case(r=20, residual="tensor", activation="silu"),
    kinds=tuple(_kind(residual, scale) for residual in RESIDUALS for scale in (0.5, torch.tensor(0.5))),
    gradcheck=tuple(
        Case(m=6, n=4, k=5, r=3, dtype=torch.float64, residual=residual, activation=activation)
        for activation in ACTIVATIONS
        for residual in ("none", "x", "tensor")
    ),
    far=(replace(_WITH_RESIDUAL, dtype=torch.bfloat16), ("x", "residual")),
    empty=(Case(m=0), Case(m=0, residual="wide", dtype=torch.bfloat16), Case(n=0, residual="none")),
    rows=((replace(_WITH_RESIDUAL, residual="x"), ("x",)), (_WITH_RESIDUAL, ("x", "residual"))),
    scaled=tuple(Case(residual=residual, dtype=dtype) for residual in RESIDUALS for dtype, _ in DTYPES[:2]),
    wrong_case=Case(m=3, n=6, k=8, r=2, residual="none", down_bias=False, up_bias=False),
    wrong=(
        ({"x": torch.randn(3, 7)}, r"x must be \(\.\.\., K\) with K = 8"),
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., K\), got a 0-d"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must have one of the dtypes .*got torch.int64"),
        ({"down_weight": torch.randn(8)}, r"down_weight must be \(r, K\)"),
        ({"down_weight": torch.randn(2, 8).bfloat16()}, "down_weight must have the dtype of x, or float32"),
        (
            {"down_weight": torch.randn(0, 8), "up_weight": torch.randn(6, 0)},
            r"down_weight must be \(r, K\) with a bottleneck r >= 1, got r = 0",
        ),
        ({"up_weight": torch.randn(6, 3)}, r"up_weight must be \(N, r\) = \(6, 2\), got \(6, 3\)"),
        ({"up_weight": torch.randn(6, 2).double()}, "up_weight must have the dtype of down_weight"),
        ({"down_bias": torch.randn(3)}, r"down_bias must be \(r,\) = \(2,\), got \(3,\)"),
        ({"down_bias": torch.randn(2).double()}, "down_bias must have the dtype of down_weight"),
        ({"up_bias": torch.randn(5)}, r"up_bias must be \(N,\) = \(6,\), got \(5,\)"),
        ({"up_bias": 1.0}, "up_bias must be a torch.Tensor, got float"),
        ({"residual": torch.randn(3, 8)}, r"residual must be \(\.\.\., N\).* = \(3, 6\), got \(3, 8\)"),
        ({"residual": torch.randn(6)}, r"residual must be \(\.\.\., N\).* = \(3, 6\), got \(6,\)"),
        ({"residual": torch.randn(3, 6).bfloat16()}, "residual must have the dtype of x, or float32"),
        ({"residual": torch.randn(3, 6, device="meta")}, r"residual must be on the device of x \(cpu\), got meta"),
        ({"residual": "x"}, "residual must be a torch.Tensor, got str"),
        ({"up_weight": torch.randn(6, 2, device="meta")}, r"up_weight must be on the device of x \(cpu\), got meta"),
        ({"activation": "swish"}, "activation must be one of relu, gelu, .*, got 'swish'"),
        ({"scale": torch.ones(2)}, "scale must be a float or a 0-d floating tensor"),
        ({"scale": "1"}, "scale must be a float or a 0-d floating tensor, got str"),
    ),
    unsupported=(
        ("cuda", Case(), "backend 'cuda' cannot run this problem: "),
        ("triton", Case(dtype=torch.float64), "backend 'triton' cannot run this problem: .*float64"),
    ),
)

# What the tests of this family's CUDA kernel call.
check_budget, output_gradient = OPERATOR.check_budget, OPERATOR.output_gradient
run_ours, run_oracle = OPERATOR.run_ours, OPERATOR.run_oracle

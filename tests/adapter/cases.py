"""Problems, their tensors, and the ways to run them, shared by the tests of the bottleneck adapter family."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core.device import Hardware
from peft_kernels.adapter.kernels import config
from python_ref import adapter as oracle
from python_ref import compare

# Backend, and whether the Triton backend makes both products of a direction in one launch.
VARIANTS = ("torch", "triton-fused", "triton-split")

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
    scale: float = 0.75
    layout: str = "rows"

    @property
    def out(self) -> int:
        """Width of y."""
        return self.k if self.residual == "x" else self.n

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32 if self.residual == "wide" else self.dtype

    def __str__(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
        adapter = f"+{short[self.adapter_dtype]}" if self.adapter_dtype else ""
        biases = f"{'d' * self.down_bias}{'u' * self.up_bias}" or "nobias"
        return (
            f"{self.m}x{self.out}x{self.k}-r{self.r}-{short[self.dtype]}{adapter}-{self.activation}-{self.residual}"
            f"-{biases}-{self.layout}"
        )


class Tensors(NamedTuple):
    """``residual`` is None where it is x."""

    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    residual: Tensor | None


class Result(NamedTuple):
    """Output and gradients of one run."""

    y: Tensor
    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    residual: Tensor | None


DTYPES = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)

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
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    drawn = Tensors(
        x=normal(case.m, case.k),
        down_weight=normal(case.r, case.k, std=case.k**-0.5),
        up_weight=normal(case.out, case.r, std=case.r**-0.5),
        down_bias=normal(case.r),
        up_bias=normal(case.out),
        residual=normal(case.m, case.out),
    )
    return _as_asked(case, drawn, device)


def make_exact(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensors, Tensor]:
    """Draw small integers whose every product and sum is exact in bfloat16, in any order, and an output gradient.

    Rows of x and of the gradient hold a single 1 or -1: z is at most 2, and no sum exceeds twice the width or the rows
    and two. The scale must be a power of two, the activation piecewise linear with whole slopes.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator, dtype=torch.float64)

    def single_signs(rows: int, cols: int) -> Tensor:
        where = torch.randint(0, cols, (rows, 1), generator=generator)
        return torch.zeros(rows, cols, dtype=torch.float64).scatter_(1, where, 2 * (where % 2).double() - 1)

    drawn = Tensors(
        x=single_signs(case.m, case.k),
        down_weight=signs(case.r, case.k),
        up_weight=signs(case.out, case.r),
        down_bias=signs(case.r),
        up_bias=signs(case.out),
        residual=signs(case.m, case.out),
    )
    return _as_asked(case, drawn, device), single_signs(case.m, case.out).to(device, case.out_dtype)


def _as_asked(case: Case, drawn: Tensors, device: torch.device) -> Tensors:
    """Put float64 tensors on the device in the case's dtypes, and x and the residual in its layout."""
    adapter = case.adapter_dtype or case.dtype

    def laid_out(matrix: Tensor) -> Tensor:
        if case.layout == "columns":
            return matrix.t().contiguous().t()
        if case.layout == "strided":
            return torch.stack((matrix, matrix.flip(1)), dim=-1)[..., 0]
        return matrix[:1].expand_as(matrix) if case.layout == "expanded" else matrix

    return Tensors(
        x=laid_out(drawn.x.to(device, case.dtype)),
        down_weight=drawn.down_weight.to(device, adapter),
        up_weight=drawn.up_weight.to(device, adapter),
        down_bias=drawn.down_bias.to(device, adapter) if case.down_bias else None,
        up_bias=drawn.up_bias.to(device, adapter) if case.up_bias else None,
        residual=laid_out(drawn.residual.to(device, case.out_dtype)) if case.residual in ("tensor", "wide") else None,
    )


def output_gradient(case: Case, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(99 + seed)
    return torch.randn(case.m, case.out, generator=generator, dtype=torch.float64).to(device, case.out_dtype)


@contextlib.contextmanager
def variant(name: str) -> Iterator[str]:
    """Yield the backend's name, with the Triton backend's path pinned; no GPU holds a width beyond the fused path's."""
    backend, _, path = name.partition("-")

    def pinned(m: int, r: int, hardware: Hardware) -> config.Path:
        return "fused" if path == "fused" and r <= config.FUSED_LIMIT else "split"

    with contextlib.ExitStack() as stack:
        if path:
            stack.enter_context(mock.patch.object(config, "product_path", pinned))
        yield backend


def arguments(case: Case, tensors: Tensors) -> dict[str, Any]:
    """The call's arguments by name, but for the backend's."""
    residual = tensors.x if case.residual == "x" else tensors.residual
    return {**tensors._replace(residual=residual)._asdict(), "activation": case.activation, "scale": case.scale}


def run_ours(case: Case, tensors: Tensors, dy: Tensor, name: str) -> Result:
    """Forward and all gradients by the package."""
    with variant(name) as backend:
        return _run(lambda leaves: pk.bottleneck_adapter(**arguments(case, leaves), backend=backend), tensors, dy)


def run_eager(case: Case, tensors: Tensors, dy: Tensor) -> Result:
    """Forward and all gradients by eager torch in the same dtypes: what the error budget is measured in."""
    return _run(lambda leaves: oracle.eager(**arguments(case, leaves)), tensors, dy)


def run_oracle(case: Case, tensors: Tensors, dy: Tensor) -> Result:
    """Forward and all gradients in float64, on the same rounded inputs."""
    wide = Tensors(*(None if tensor is None else tensor.double() for tensor in tensors))
    y, _ = oracle.forward(**arguments(case, wide))
    options = {name: value for name, value in arguments(case, wide).items() if name not in ("up_bias", "residual")}
    grads = oracle.backward(dy.double(), **options, serial=case.residual == "x")
    return Result(y, *(None if tensor is None else getattr(grads, name) for name, tensor in tensors._asdict().items()))


def check_budget(case: Case, device: torch.device, run: Callable[[Case, Tensors, Tensor], Result]) -> None:
    """Hold a way to run a case against the error budget, and see that it leaves its inputs alone.

    The budget compares norms of rounding errors. Those of n independent values scatter by a share of 1 / sqrt(n), and
    the bottleneck's bias, whose gradient has all other errors in it, has r values: few of them ask for more draws.
    """
    draws: list[tuple[Result, Result, Result]] = []
    for seed in range(max(1, min(8, 60 // case.r))):
        tensors, dy = make(case, device, seed), output_gradient(case, device, seed)
        given = [tensor for tensor in (*tensors, dy) if tensor is not None]
        before = [tensor.clone() for tensor in given]
        ours = run(case, tensors, dy)
        for old, new in zip(before, given, strict=True):
            compare.assert_bitwise_equal("an input after the call", new, old)
        draws.append((ours, run_eager(case, tensors, dy), run_oracle(case, tensors, dy)))
    for label in named(draws[0][0]):
        ours, eager, exact = (torch.stack([getattr(draw[index], label) for draw in draws]) for index in range(3))
        compare.assert_close(f"{case} {label}", ours, eager, exact)


def named(result: Result) -> dict[str, Tensor]:
    """The tensors of a result by name, without those that are not there."""
    return {name: tensor for name, tensor in zip(Result._fields, result, strict=True) if tensor is not None}


def _run(call: Callable[[Tensors], Tensor], tensors: Tensors, dy: Tensor) -> Result:
    leaves = Tensors(*(None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors))
    y = call(leaves)
    grads = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy))
    return Result(y.detach(), *(None if leaf is None else next(grads) for leaf in leaves))

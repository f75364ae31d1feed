"""What a bottleneck adapter call is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.adapter.kernels.activations import ACTIVATIONS

NAME = "bottleneck_adapter"

TENSORS = checks.Table(
    NAME,
    "x",
    (
        checks.Row(
            "down_weight",
            "r K",
            dtype_of="x",
            or_float32=True,
            then=lambda sizes: None if sizes["r"] else "down_weight must be (r, K) with a bottleneck r >= 1, got r = 0",
        ),
        checks.Row("x", "... K", meanings={"K": "down_weight's in-features"}),
        checks.Row("up_weight", "N r", dtype_of="down_weight"),
        checks.Row("down_bias", "r", dtype_of="down_weight", optional=True),
        checks.Row("up_bias", "N", dtype_of="down_weight", optional=True),
        checks.Row("residual", "... N", dtype_of="x", or_float32=True, optional=True),
    ),
)


class Inputs(NamedTuple):
    """The arguments of one call.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        down_weight: (r, K), in x's dtype or float32, as nn.Linear stores it.
        up_weight: (N, r), in down_weight's dtype.
        down_bias: (r,) in down_weight's dtype, or None.
        up_bias: (N,) in down_weight's dtype, or None.
        residual: as x, with N, in x's dtype or float32; None where x is the residual or there is none.
        serial: whether x is the residual.
        activation: a name of ``ACTIVATIONS``.
        scale: float, or a 0-d tensor on x's device.
    """

    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    residual: Tensor | None
    serial: bool
    activation: str
    scale: float | Tensor


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for. The residual's is dy itself and asks for nothing."""

    x: bool
    down_weight: bool
    up_weight: bool
    down_bias: bool
    up_bias: bool

    @property
    def dz(self) -> bool:
        """Whether the gradient of the pre-activation is on the way to one of them."""
        return self.x or self.down_weight or self.down_bias


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of ``Inputs``."""

    x: Tensor | None
    down_weight: Tensor | None
    up_weight: Tensor | None
    down_bias: Tensor | None
    up_bias: Tensor | None


@dataclass(frozen=True)
class BottleneckAdapterProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        m, n, k, r: tokens, out-features, in-features, width of the bottleneck.
        dtype: of x and its gradient.
        adapter_dtype: of the weights and biases.
        out_dtype: of the result: the residual's, or x's where there is none.
        serial: whether x is the residual.
        activation: a name of ``ACTIVATIONS``.
        device: of all tensors.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    out_dtype: torch.dtype
    serial: bool
    activation: str
    device: torch.device

    @property
    def is_empty(self) -> bool:
        """Whether no product has an element or a term."""
        return self.m == 0 or self.n == 0 or self.k == 0

    @property
    def is_mixed(self) -> bool:
        """Whether float32 weights meet half-precision activations, so that no product may round a weight."""
        return self.adapter_dtype != self.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of z and dz on every backend."""
        return checks.wide_dtype(self.dtype)


def make_problem(call: Inputs) -> BottleneckAdapterProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    x, residual = call.x, call.residual
    sizes = TENSORS.check(call)
    if call.serial and sizes["K"] != sizes["N"]:
        TENSORS.check(call._replace(residual=x))  # names the residual
    if call.activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation must be one of {', '.join(ACTIVATIONS)}, got {call.activation!r}")
    checks.scalar(NAME, "scale", call.scale)
    return BottleneckAdapterProblem(
        m=math.prod(sizes["..."]),
        n=sizes["N"],
        k=sizes["K"],
        r=sizes["r"],
        dtype=x.dtype,
        adapter_dtype=call.down_weight.dtype,
        out_dtype=x.dtype if residual is None else residual.dtype,
        serial=call.serial,
        activation=call.activation,
        device=x.device,
    )

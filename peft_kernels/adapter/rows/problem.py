"""What a call of ``adapter_rows`` is made of: stacked adapters, a plan of rows, and every check, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.adapter.kernels.activations import ACTIVATIONS

NAME = "adapter_rows"

# The rows of a table: where a slot's ranks begin in the stacked weights, and how many it has.
FIRST, RANK = range(2)

TENSORS = checks.Table(
    NAME,
    "x",
    (
        checks.Row("x", "... K"),
        checks.Row("down_weight", "R K", dtype_of="x", or_float32=True),
        checks.Row("scales", "T"),
        checks.Row("table", "2 T"),
        checks.Row("up_weight", "N R", dtype_of="down_weight"),
        checks.Row("down_bias", "R", dtype_of="down_weight", optional=True),
        checks.Row("up_bias", "T N", dtype_of="down_weight", optional=True),
        checks.Row("residual", "... N", dtype_of="x", or_float32=True, optional=True),
    ),
)


class Inputs(NamedTuple):
    """The arguments of one call: adapters of T slots, R the sum of their widths.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        down_weight: (R, K), the slots' under each other, in x's dtype or float32.
        up_weight: (N, R), the slots' side by side, in down_weight's dtype.
        down_bias: (R,) in down_weight's dtype, or None.
        up_bias: (T, N), a row for each slot, in down_weight's dtype, or None.
        residual: as x, with N, in x's dtype or float32; None where x is the residual or there is none.
        serial: whether x is the residual.
        activation: a name of ``ACTIVATIONS``, of all slots.
        scales: (T,), float32, or float64 beside a float64 x.
        table: (2, T) int32: ``FIRST`` and ``RANK`` of each slot.
        ranks: of each slot; 0 is an adapter that this layer does not have.
        slot, order, first, runs: as ``Rows`` has them.
    """

    x: Tensor
    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    residual: Tensor | None
    serial: bool
    activation: str
    scales: Tensor
    table: Tensor
    ranks: tuple[int, ...]
    slot: Tensor
    order: Tensor
    first: Tensor
    runs: Tensor | None


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
    """Gradients of one call, None where not asked for; shapes and dtypes are those of ``Inputs``.

    A slot without rows has zeros in those of the adapters.
    """

    x: Tensor | None
    down_weight: Tensor | None
    up_weight: Tensor | None
    down_bias: Tensor | None
    up_bias: Tensor | None


@dataclass(frozen=True)
class AdapterRowsProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        m, n, k: tokens, out-features, in-features.
        ranks: their widths.
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
    ranks: tuple[int, ...]
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    out_dtype: torch.dtype
    serial: bool
    activation: str
    device: torch.device

    @property
    def is_empty(self) -> bool:
        """Whether no product has an element or a term."""
        return 0 in (self.m, self.n, self.k, self.width)

    @property
    def slots(self) -> int:
        """How many adapters there are."""
        return len(self.ranks)

    @property
    def r(self) -> int:
        """Rows of the stacked weights."""
        return sum(self.ranks)

    @property
    def width(self) -> int:
        """Of z."""
        return max(self.ranks, default=0)

    @property
    def is_mixed(self) -> bool:
        """Whether float32 weights meet half-precision activations, so that no product may round a weight."""
        return self.adapter_dtype != self.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of z and dz on every backend."""
        return checks.wide_dtype(self.dtype)


def make_problem(call: Inputs) -> AdapterRowsProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    x, residual, slots = call.x, call.residual, call.first.shape[0] - 1
    if len(call.ranks) != slots:
        raise ValueError(f"{NAME}: ranks must be of the rows' {slots} slots, got {len(call.ranks)}")
    sizes = TENSORS.check(call)
    if call.serial and sizes["K"] != sizes["N"]:
        TENSORS.check(call._replace(residual=x))  # names the residual
    if call.activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation must be one of {', '.join(ACTIVATIONS)}, got {call.activation!r}")
    m = math.prod(sizes["..."])
    if call.slot.shape[0] != m:
        raise ValueError(f"{NAME}: rows must be as many as x has, {m}, got {call.slot.shape[0]}")
    for name, size in (("slot", m), ("order", m), ("first", slots + 1)):
        _check_plan(name, getattr(call, name), size, x)
    return AdapterRowsProblem(
        m=m,
        n=sizes["N"],
        k=sizes["K"],
        ranks=call.ranks,
        dtype=x.dtype,
        adapter_dtype=call.down_weight.dtype,
        out_dtype=x.dtype if residual is None else residual.dtype,
        serial=call.serial,
        activation=call.activation,
        device=x.device,
    )


def _check_plan(name: str, tensor: Tensor, size: int, x: Tensor) -> None:
    if tensor.shape != (size,) or tensor.dtype != torch.int32:
        raise ValueError(f"{NAME}: rows.{name} must be int32 ({size},), got {tensor.dtype} {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{NAME}: rows must be on the device of x ({x.device}), got {tensor.device}")

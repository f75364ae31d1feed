"""What a linear call with a gain and no update is made of: tensors, the facts that backends decide on, and checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks

NAME = "lora_gain_alone"

_TENSORS = checks.Table(
    NAME,
    "x",
    (
        checks.Row("weight", "N K", dtype_of="x"),
        checks.Row("x", "... K", meanings={"K": "weight's in-features"}),
        checks.Row("gain", "N", dtype_of="x", or_float32=True),
        checks.Row("bias", "N", dtype_of="x", optional=True),
    ),
)


class Inputs(NamedTuple):
    """The arguments of one call.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        weight: (N, K), in x's dtype, as nn.Linear stores it.
        gain: (N,), in x's dtype or float32.
        bias: (N,) in x's dtype, or None; multiplied too.
    """

    x: Tensor
    weight: Tensor
    gain: Tensor
    bias: Tensor | None

    @property
    def has_own_weight(self) -> bool:
        """As that of a call with an update."""
        return False


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for."""

    x: bool
    weight: bool
    gain: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of ``Inputs``."""

    x: Tensor | None
    weight: Tensor | None
    gain: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class LoraGainAloneProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        m, n, k: tokens, out-features, in-features.
        dtype: of x, y and their gradients.
        gain_dtype: of the gain and its gradient.
        device: of all tensors.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    gain_dtype: torch.dtype
    device: torch.device

    @property
    def is_empty(self) -> bool:
        """Whether no product has an element or a term."""
        return self.m == 0 or self.n == 0 or self.k == 0

    @property
    def wide_dtype(self) -> torch.dtype:
        """In which sums over rows are made."""
        return checks.wide_dtype(self.dtype)


def make_problem(call: Inputs) -> LoraGainAloneProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    sizes = _TENSORS.check(call)
    return LoraGainAloneProblem(
        m=math.prod(sizes["..."]),
        n=sizes["N"],
        k=sizes["K"],
        dtype=call.x.dtype,
        gain_dtype=call.gain.dtype,
        device=call.x.device,
    )

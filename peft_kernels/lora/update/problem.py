"""What a LoRA update of a given y is made of: the tensors, the facts that backends decide on, and every check, once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels._core.autocast import autocast_dtype
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.linear.problem import FACTORS, LoraLinearProblem, check_seed
from peft_kernels.lora.linear.problem import Inputs as LinearInputs
from peft_kernels.lora.members import Needs as MembersNeeds

NAME = "lora_update"

TENSORS = checks.Table(NAME, "x", (checks.Row("x", "... K"), *FACTORS, checks.Row("y", "... N")))


class Inputs(NamedTuple):
    """The arguments of one call.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        y: (..., N), any strides, in x's dtype, or another below float64 beside float32 factors; contiguous (M, N),
            and added to in place, where an implementation takes it.
        lora_a: (r, K), in x's dtype or float32.
        lora_b: (N, r), in lora_a's dtype.
        scale: float, or a 0-d tensor on x's device.
        dropout_p: probability of dropping an element of x.
        seed: 0-d int64 tensor on x's device; None exactly when nothing is dropped.
    """

    x: Tensor
    y: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float | Tensor
    dropout_p: float
    seed: Tensor | None

    @property
    def linear(self) -> LinearInputs:
        """As the steps of ``lora_linear`` take it, none of which read a weight."""
        x, _, lora_a, lora_b, scale, dropout_p, seed = self
        return LinearInputs(x, None, lora_a, lora_b, scale, None, dropout_p, seed)  # type: ignore[arg-type]


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for; y's is dY itself."""

    x: bool
    lora_a: bool
    lora_b: bool

    @property
    def of_members(self) -> MembersNeeds:
        """As steps of operators on members take it, of which there is one, with one update."""
        return MembersNeeds(self.x, (False,), (False,), (self.lora_a,), (self.lora_b,))


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of ``Inputs``."""

    x: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


@dataclass(frozen=True)
class LoraUpdateProblem:
    """The facts that choose a backend and its configs.

    Attributes:
        m, n, k, r: tokens, out-features, in-features, rank.
        dtype: of x and its gradient.
        y_dtype: of y, the result and dY.
        adapter_dtype: of lora_a and lora_b.
        device: of all tensors.
        dropout_threshold: a 16-bit draw below it drops its element; 0 is no dropout.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype
    y_dtype: torch.dtype
    adapter_dtype: torch.dtype
    device: torch.device
    dropout_threshold: int

    @property
    def is_empty(self) -> bool:
        """Whether no product has an element or a term."""
        return self.m == 0 or self.n == 0 or self.k == 0

    @property
    def wide_dtype(self) -> torch.dtype:
        """Of S and dS on every backend."""
        return checks.wide_dtype(self.dtype)

    @cached_property
    def of_x(self) -> LoraLinearProblem:
        """The same as the steps of ``lora_linear`` take it that read x, or make its gradient."""
        return self._linear(self.dtype, self.dropout_threshold)

    @cached_property
    def of_y(self) -> LoraLinearProblem:
        """The same for those that add to y, or read dY."""
        return self._linear(self.y_dtype, 0)

    def _linear(self, dtype: torch.dtype, threshold: int) -> LoraLinearProblem:
        return LoraLinearProblem(
            m=self.m,
            n=self.n,
            k=self.k,
            r=self.r,
            dtype=dtype,
            adapter_dtype=self.adapter_dtype,
            device=self.device,
            dropout_threshold=threshold,
        )


def make_problem(call: Inputs) -> LoraUpdateProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    x, y = call.x, call.y
    sizes = TENSORS.check(call)
    check_dtypes(NAME, y.dtype, x.dtype, call.lora_a.dtype)
    checks.scalar(NAME, "scale", call.scale)
    threshold = dropout.threshold(call.dropout_p, NAME)
    if call.seed is not None:
        check_seed(NAME, call.seed, x.device)
    return LoraUpdateProblem(
        m=math.prod(sizes["..."]),
        n=sizes["N"],
        k=sizes["K"],
        r=sizes["r"],
        dtype=x.dtype,
        y_dtype=y.dtype,
        adapter_dtype=call.lora_a.dtype,
        device=x.device,
        dropout_threshold=threshold,
    )


def are_mixed(y: torch.dtype, x: torch.dtype) -> bool:
    """Whether y and x have two dtypes that an update takes beside each other, with factors in float32."""
    return y != x and torch.float64 not in (y, x) and y in checks.FLOATING


def cast_for_y(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and factors in the dtypes that an update of y takes: autocast's, and float32 factors where x's is not y's.

    What is no tensor, or a factor of some other dtype, is refused by the checks as it is.
    """
    dtype = autocast_dtype(x.device.type) if isinstance(x, Tensor) else None
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
        if lora_a.dtype != torch.float32:
            lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    if all(isinstance(tensor, Tensor) for tensor in (x, y, lora_a, lora_b)) and are_mixed(y.dtype, x.dtype):
        lora_a, lora_b = (factor.float() if factor.dtype == x.dtype else factor for factor in (lora_a, lora_b))
    return x, lora_a, lora_b


def check_dtypes(operator: str, y: torch.dtype, x: torch.dtype, adapter: torch.dtype) -> None:
    """Check that y's dtype is one of those beside x's and the factors'.

    Raises:
        ValueError: naming what it must be and what it was.
    """
    if y != x and not are_mixed(y, x):
        raise ValueError(f"{operator}: y must have x's dtype ({x}), or another floating one below float64, got {y}")
    if y != x and adapter != torch.float32:
        raise ValueError(f"{operator}: lora_a must be {torch.float32} where y is {y} and x is {x}, got {adapter}")

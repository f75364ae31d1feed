"""What a LoRA linear call with a gain is made of: the tensors, the facts that backends decide on, and every check."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.linear.problem import FACTORS, LoraLinearProblem, check_seed
from peft_kernels.lora.linear.problem import TENSORS as LINEAR
from peft_kernels.lora.linear.problem import Inputs as LinearInputs

NAME = "lora_gain"

TENSORS = checks.Table(NAME, "x", (*LINEAR.rows, checks.Row("gain", "N", dtype_of="x", or_float32=True)))


class Inputs(NamedTuple):
    """The arguments of one call: ``lora_linear``'s, and the gain.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        weight: (N, K), in x's dtype, as nn.Linear stores it.
        lora_a: (r, K), in x's dtype or float32.
        lora_b: (N, r), in lora_a's dtype.
        gain: (N,), in x's dtype or float32.
        scale: float, or a 0-d tensor on x's device.
        bias: (N,) in x's dtype, or None.
        dropout_p: probability of dropping an element of x on the low-rank branch.
        seed: 0-d int64 tensor on x's device; None exactly when nothing is dropped.
    """

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    gain: Tensor
    scale: float | Tensor
    bias: Tensor | None
    dropout_p: float
    seed: Tensor | None

    @property
    def has_own_weight(self) -> bool:
        """Whether a weight that was asked for is nobody else's, and may be written to."""
        return False

    def linear(self, lora_b: Tensor | None) -> LinearInputs:
        """As a call of ``lora_linear``'s steps with another B; without the weight, which these do not read, and the
        bias, which no gain multiplies.
        """
        return LinearInputs(
            self.x,
            None,  # type: ignore[arg-type]
            self.lora_a,
            lora_b,  # type: ignore[arg-type]
            self.scale,
            None,
            self.dropout_p,
            self.seed,
        )


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    gain: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of ``Inputs``."""

    x: Tensor | None
    weight: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    gain: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class LoraGainProblem(LoraLinearProblem):
    """The facts that choose a backend and its configs: ``lora_linear``'s, and the gain's dtype."""

    gain_dtype: torch.dtype = torch.float32


def make_problem(call: Inputs) -> LoraGainProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    return LoraGainProblem(**facts(call, TENSORS.check(call), NAME))


def facts(call: Any, sizes: checks.Sizes, operator: str) -> dict[str, Any]:
    """A problem's fields, of a call with these sizes; checks what its table does not.

    Raises:
        ValueError: as ``make_problem``.
    """
    x = call.x
    checks.scalar(operator, "scale", call.scale)
    threshold = dropout.threshold(call.dropout_p, operator)
    if call.seed is not None:
        check_seed(operator, call.seed, x.device)
    return {
        "m": math.prod(sizes["..."]),
        "n": sizes["N"],
        "k": sizes["K"],
        "r": sizes["r"],
        "dtype": x.dtype,
        "adapter_dtype": call.lora_a.dtype,
        "device": x.device,
        "dropout_threshold": threshold,
        "gain_dtype": call.gain.dtype,
    }


class _Dora(NamedTuple):
    """What ``dora_gain``'s checks are about."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor


_DORA = checks.Table(
    "dora_gain",
    "weight",
    (
        checks.Row("weight", "N K"),
        *(replace(row, dtype_of="") for row in FACTORS),
        checks.Row("magnitude", "N"),
    ),
)


def check_dora(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor, magnitude: Tensor) -> None:
    """Check the arguments of ``dora_gain``, whose tensors may have several dtypes.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    given = _Dora(weight, lora_a, lora_b, magnitude)
    _DORA.check(given)
    checks.scalar(_DORA.operator, "scale", scale)
    for name, tensor in given._asdict().items():
        if tensor.dtype not in checks.FLOATING:
            raise ValueError(f"{_DORA.operator}: {name} must have a floating dtype, got {tensor.dtype}")

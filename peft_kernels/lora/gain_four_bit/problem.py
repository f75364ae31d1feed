"""What a LoRA linear call with a gain on a 4-bit weight is made of: the arguments, the problem, and every check."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.four_bit_weight.problem import DequantizeProblem
from peft_kernels.four_bit_weight.problem import Inputs as Weight
from peft_kernels.four_bit_weight.problem import make_problem as check_weight
from peft_kernels.lora.gain.problem import TENSORS, LoraGainProblem, facts

NAME = "lora_gain_four_bit"

_TENSORS = checks.Table(NAME, "x", tuple(row for row in TENSORS.rows if row.name != "weight"))


class Inputs(NamedTuple):
    """The arguments of one call: ``lora_gain``'s, whose weight is packed.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        packed, block_scales, code, nested_scales, offset, global_scale: as ``dequantize`` takes them.
        kind, block_size, nested_block_size: the format; the last is 0 without a second level.
        out_features, in_features: N and K.
        lora_a, lora_b, gain, scale, bias, dropout_p, seed: as ``lora_gain``'s.
    """

    x: Tensor
    packed: Tensor
    block_scales: Tensor
    code: Tensor | None
    nested_scales: Tensor | None
    offset: float | Tensor
    global_scale: float | Tensor
    kind: str
    block_size: int
    nested_block_size: int
    out_features: int
    in_features: int
    lora_a: Tensor
    lora_b: Tensor
    gain: Tensor
    scale: float | Tensor
    bias: Tensor | None
    dropout_p: float
    seed: Tensor | None

    def weight(self, dtype: torch.dtype) -> Weight:
        """The weight as a call that decodes it to a dtype: x's, where there may be no x any more."""
        shape = self.out_features, self.in_features
        return Weight(*self[1:8], shape, dtype, self.block_size, self.nested_block_size)


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for; none is the weight's."""

    x: bool
    lora_a: bool
    lora_b: bool
    gain: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of ``Inputs``."""

    x: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    gain: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class LoraGainFourBitProblem(LoraGainProblem):
    """``lora_gain``'s problem on the decoded weight, and how that is stored.

    Attributes:
        kind, block_size, nested_block_size: the format.
    """

    kind: str = field(kw_only=True)
    block_size: int = field(kw_only=True)
    nested_block_size: int = field(kw_only=True)

    @cached_property
    def weight(self) -> DequantizeProblem:
        """The weight as ``dequantize``'s problem."""
        return self.decoding()

    def decoding(self) -> DequantizeProblem:
        """The same, made anew: torch.compile cannot trace what is remembered."""
        facts = self.kind, self.block_size, self.nested_block_size, self.dtype, self.device
        return DequantizeProblem(self.n * self.k, *facts)


def make_problem(call: Inputs) -> LoraGainFourBitProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    sizes = _TENSORS.check(call, known={"N": call.out_features, "K": call.in_features})
    try:
        decoded = check_weight(call.weight(call.x.dtype))
    except ValueError as error:
        raise ValueError(f"{NAME}: weight: {error}") from error
    if decoded.device != call.x.device:
        raise ValueError(f"{NAME}: weight must be on the device of x ({call.x.device}), got {decoded.device}")
    stored = {name: getattr(call, name) for name in ("kind", "block_size", "nested_block_size")}
    return LoraGainFourBitProblem(**facts(call, sizes, NAME), **stored)

"""What a LoRA call on 4-bit weights is made of: packed members, updates, the facts that backends decide on, checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core import checks
from peft_kernels.four_bit_weight.problem import DequantizeProblem
from peft_kernels.four_bit_weight.problem import Inputs as Weight
from peft_kernels.four_bit_weight.problem import make_problem as check_weight
from peft_kernels.four_bit_weight.quant_state import QuantizedWeight
from peft_kernels.lora.group.problem import LoraGroupProblem, check_structure
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.linear.problem import FACTORS, are_rows_aligned, check_seed

NAME = "lora_four_bit"

_BESIDE = (checks.Row("x", "... K"), checks.Row("bias", "N", dtype_of="x", optional=True))
_FROZEN = checks.Table(NAME, "x", _BESIDE)
_ADAPTED = checks.Table(NAME, "x", (*_BESIDE, *FACTORS))


class _Member(NamedTuple):
    """What a member's checks are about, beside the weight."""

    x: Tensor
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None


class Inputs(NamedTuple):
    """The arguments of one call: P packed weights of one format, the *members*, and L low-rank *updates*.

    Attributes:
        x: (..., K), any strides; (M, K) where an implementation takes it.
        packed: uint8 of each member; this and the next five as ``dequantize`` takes them.
        block_scales: of each member.
        codes, nested_scales: of the second level of each member, or None.
        offsets, global_scales: of each member.
        kind: name of all members' format.
        block_size, nested_block_size: of all members; the latter is 0 without a second level.
        out_features, in_features: N_j and K of each member.
        biases: (N_j,) of each member in x's dtype, or None.
        lora_a, lora_b, scales, members, dropout_p, lanes, seed: as ``lora_group``'s.
    """

    x: Tensor
    packed: tuple[Tensor, ...]
    block_scales: tuple[Tensor, ...]
    codes: tuple[Tensor | None, ...]
    nested_scales: tuple[Tensor | None, ...]
    offsets: tuple[float | Tensor, ...]
    global_scales: tuple[float | Tensor, ...]
    kind: str
    block_size: int
    nested_block_size: int
    out_features: tuple[int, ...]
    in_features: tuple[int, ...]
    biases: tuple[Tensor | None, ...]
    lora_a: tuple[Tensor, ...]
    lora_b: tuple[Tensor, ...]
    scales: tuple[float | Tensor, ...]
    members: tuple[int, ...]
    dropout_p: tuple[float, ...]
    lanes: tuple[int, ...]
    seed: Tensor | None

    def weight(self, member: int, dtype: torch.dtype) -> Weight:
        """A member's weight as a call that decodes it to a dtype: x's, where there may be no x any more."""
        return Weight(
            self.packed[member],
            self.block_scales[member],
            self.codes[member],
            self.nested_scales[member],
            self.offsets[member],
            self.global_scales[member],
            self.kind,
            (self.out_features[member], self.in_features[member]),
            dtype,
            self.block_size,
            self.nested_block_size,
        )


class Needs(NamedTuple):
    """Which gradients a backward pass is asked for: of x, of each member's bias, and of each update's factors."""

    x: bool
    biases: tuple[bool, ...]
    lora_a: tuple[bool, ...]
    lora_b: tuple[bool, ...]


class Gradients(NamedTuple):
    """Gradients of one call, None where not asked for; shapes and dtypes are those of the arguments."""

    x: Tensor | None
    biases: tuple[Tensor | None, ...]
    lora_a: tuple[Tensor | None, ...]
    lora_b: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class LoraFourBitProblem(LoraGroupProblem):
    """The group that decoded members are, and how they are stored.

    Attributes:
        kind, block_size, nested_block_size: of all members.
    """

    kind: str = field(kw_only=True)
    block_size: int = field(kw_only=True)
    nested_block_size: int = field(kw_only=True)

    @cached_property
    def weights(self) -> tuple[DequantizeProblem, ...]:
        """Of each member."""
        return tuple(map(self.weight, range(len(self.n))))

    def weight(self, member: int) -> DequantizeProblem:
        """A member's weight as ``dequantize``'s problem."""
        facts = self.kind, self.block_size, self.nested_block_size, self.dtype, self.device
        return DequantizeProblem(self.n[member] * self.k, *facts)


def flattened(weights: Sequence[Any]) -> tuple[Any, ...]:
    """Members' weights as ``Inputs`` has them, from packed to in_features.

    Raises:
        ValueError: one of them is no 4-bit matrix, or of another format than the first.
    """
    for member, weight in enumerate(weights):
        label = f"{NAME}: members[{member}].weight"
        if not isinstance(weight, QuantizedWeight):
            raise ValueError(f"{label} must be a QuantizedWeight, as another member's is, got {type(weight).__name__}")
        if len(weight.shape) != 2:
            raise ValueError(f"{label} must be (N, K), got a weight of shape {tuple(weight.shape)}")
        if _format(weight) != _format(weights[0]):
            raise ValueError(
                f"{label} must be of the format of members[0].weight, {_described(weights[0])}, "
                f"got {_described(weight)}"
            )
    nested = [weight.nested or (None, None, 0, 0.0) for weight in weights]
    return (
        tuple([weight.packed for weight in weights]),
        tuple([weight.scales for weight in weights]),
        tuple([code for code, *_ in nested]),
        tuple([scales for _, scales, *_ in nested]),
        tuple([offset for *_, offset in nested]),
        tuple([1.0 if weight.global_scale is None else weight.global_scale for weight in weights]),
        *_format(weights[0]),
        tuple([weight.shape[0] for weight in weights]),
        tuple([weight.shape[1] for weight in weights]),
    )


def _format(weight: QuantizedWeight) -> tuple[Any, ...]:
    return weight.kind, weight.block_size, 0 if weight.nested is None else weight.nested[2]


def _described(weight: QuantizedWeight) -> str:
    kind, block, nested = _format(weight)
    return f"{kind} in blocks of {block}{f' with scales in blocks of {nested}' if nested else ''}"


def make_problem(call: Inputs) -> LoraFourBitProblem:
    """Check the arguments of a call and describe it.

    Raises:
        ValueError: naming the argument, what it must be and what it was.
    """
    x = call.x
    check_structure(call, call.packed, NAME)
    for member, (n, bias) in enumerate(zip(call.out_features, call.biases, strict=True)):
        part = f"members[{member}]."
        sizes = _FROZEN.check(_Member(x, bias), part, {"N": n})
        _check_weight(call, member, sizes["K"])
        for owner, lora_a, lora_b, scale in zip(call.members, call.lora_a, call.lora_b, call.scales, strict=True):
            if owner == member:
                _ADAPTED.check(_Member(x, bias, lora_a, lora_b), part, {"N": n})
                checks.scalar(NAME, f"{part}scale", scale)
    if call.seed is not None:
        check_seed(NAME, call.seed, x.device)
    return LoraFourBitProblem(
        m=math.prod(sizes["..."]),
        k=sizes["K"],
        n=call.out_features,
        r=tuple(a.shape[0] for a in call.lora_a),
        members=call.members,
        dtype=x.dtype,
        adapter_dtypes=tuple(a.dtype for a in call.lora_a),
        thresholds=tuple(map(dropout.threshold, call.dropout_p)),
        lanes=call.lanes,
        device=x.device,
        rows_aligned=tuple(_are_rows_aligned(x, lora_a) for lora_a in call.lora_a),
        kind=call.kind,
        block_size=call.block_size,
        nested_block_size=call.nested_block_size,
    )


def _check_weight(call: Inputs, member: int, k: int) -> None:
    label, shape = f"{NAME}: members[{member}].weight", (call.out_features[member], call.in_features[member])
    if shape[1] != k:
        raise ValueError(f"{label} must be (N, K) with K = {k}, x's features, got {shape}")
    try:
        decoded = check_weight(call.weight(member, call.x.dtype))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    if decoded.device != call.x.device:
        raise ValueError(f"{label} must be on the device of x ({call.x.device}), got {decoded.device}")


def _are_rows_aligned(x: Tensor, lora_a: Tensor) -> bool:
    """A decoded weight is contiguous: its rows are aligned where a row of x, were it so, would be."""
    return x.shape[-1] * x.element_size() % 16 == 0 and are_rows_aligned(x, lora_a, lora_a)

"""What a LoRA layer of PEFT's computes with, read once for a call, and the operations that this makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from peft_kernels.lora.group.op import Update
from peft_kernels.lora.group.problem import Inputs as GroupInputs
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.linear.problem import Inputs


class Modules(NamedTuple):
    """What PEFT's forward calls, beside the base layer, for an active adapter."""

    name: str
    down: Any
    up: Any
    dropout: Any
    scaling: Any


class Factors(NamedTuple):
    """The low-rank updates of a call, read once: the tensors and numbers of each active adapter.

    Attributes:
        downs, ups, up_biases: of each adapter.
        scalings, ps: of each adapter; p is 0 where its dropout is not at work.
    """

    downs: list[Tensor]
    ups: list[Tensor]
    up_biases: list[Tensor | None]
    scalings: list[Any]
    ps: list[float]

    def tensors(self) -> Iterator[Tensor]:
        """All that must be where x is; a scaling may also be on the CPU, as PEFT's product takes it."""
        yield from (*self.downs, *self.ups)
        yield from (bias for bias in self.up_biases if bias is not None)
        yield from (scaling for scaling in self.scalings if isinstance(scaling, Tensor) and not scaling.is_cpu)

    def drops(self) -> bool:
        """Whether an adapter's dropout is at work; each p below 1."""
        return any(dropout.threshold(p) > 0 for p in self.ps)

    def joined(self) -> tuple[Tensor, Tensor, Any]:
        """One update for all adapters, where there is one, or none drops anything: their ranks stand side by side."""
        if len(self.downs) == 1:
            return self.downs[0], self.ups[0], self.scalings[0]
        scaled_ups = [up * scaling for up, scaling in zip(self.ups, self.scalings, strict=True)]
        return torch.cat(self.downs), torch.cat(scaled_ups, dim=1), 1.0


class Operands(NamedTuple):
    """What a call of a layer computes with whose weight can be read.

    Attributes:
        weight: as the base layer stores it.
        bias: the base layer's, or None.
        is_transposed: whether the base layer stores (in, out), as Conv1D does.
        downs, ups, up_biases, scalings, ps: as ``Factors`` has them.
    """

    weight: Tensor
    bias: Tensor | None
    is_transposed: bool
    downs: list[Tensor]
    ups: list[Tensor]
    up_biases: list[Tensor | None]
    scalings: list[Any]
    ps: list[float]

    @property
    def factors(self) -> Factors:
        return Factors(*self[3:])

    def tensors(self) -> Iterator[Tensor]:
        """All that must be where x is."""
        yield self.weight
        if self.bias is not None:
            yield self.bias
        yield from self.factors.tensors()

    def drops(self) -> bool:
        """Whether an adapter's dropout is at work; each p below 1."""
        return self.factors.drops()

    def values(self) -> list[Any]:
        """All that the result depends on beside x."""
        last = [self.weight, self.bias, self.is_transposed, *self.downs, *self.ups]
        return [*last, *self.up_biases, *self.scalings, *self.ps]


class Lanes(NamedTuple):
    """A call of a layer with several active adapters whose dropout is at work: each has a mask of its own."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    updates: list[Update]

    def inputs(self) -> GroupInputs:
        """As the operator takes it."""
        return group_inputs(self.x, (self.weight,), (self.bias,), self.updates)


def active(layer: PeftLinear) -> list[Modules]:
    """The active adapters of a layer."""
    downs, ups, dropouts = layer.lora_A, layer.lora_B, layer.lora_dropout
    return [
        Modules(name, downs[name], ups[name], dropouts[name], layer.scaling[name])
        for name in layer.active_adapters
        if name in downs
    ]


def operands_of(layer: PeftLinear, adapters: list[Modules]) -> Operands:
    """Read a layer's tensors and numbers."""
    base: Any = layer.base_layer
    return Operands(base.weight, base.bias, not isinstance(base, nn.Linear), *factors_of(adapters))


def factors_of(adapters: list[Modules]) -> Factors:
    """Read the tensors and numbers of adapters."""
    return Factors(
        [adapter.down.weight for adapter in adapters],
        [adapter.up.weight for adapter in adapters],
        [adapter.up.bias for adapter in adapters],
        [adapter.scaling for adapter in adapters],
        [adapter.dropout.p if _is_at_work(adapter.dropout) else 0.0 for adapter in adapters],
    )


def base_of(operands: Operands) -> tuple[Tensor, Tensor | None]:
    """The frozen product's weight (N, K), and the bias with those of the adapters."""
    weight, bias = operands.weight, operands.bias
    weight = weight.t() if operands.is_transposed else weight
    for up_bias, scaling in zip(operands.up_biases, operands.scalings, strict=True):
        if up_bias is not None:
            scaled = up_bias * scaling
            bias = scaled.to(weight.dtype) if bias is None else (bias + scaled).to(bias.dtype)
    return weight, bias


def updates_of(operands: Operands, member: int = 0, lane: int = 0, step: int = 1) -> list[Update]:
    """The adapters as updates of a member; the first one's mask is the lane's, the next ones' are ``step`` apart."""
    adapters = zip(operands.downs, operands.ups, operands.scalings, operands.ps, strict=True)
    return [
        Update(member, down, up, scaling, p, lane + step * index)
        for index, (down, up, scaling, p) in enumerate(adapters)
    ]


def joined(operands: Operands, x: Tensor) -> Inputs | Lanes:
    """One call for all active adapters. Its seed is not drawn yet."""
    weight, bias = base_of(operands)
    if len(operands.downs) > 1 and operands.drops():
        return Lanes(x, weight, bias, updates_of(operands))
    return Inputs(x, weight, *operands.factors.joined(), bias, operands.ps[0], None)


def group_inputs(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], updates: Sequence[Update]
) -> GroupInputs:
    """A call of ``group_call`` by the operator's own arguments, for what only has to know what it is like."""
    members, downs, ups, scales, ps, lanes = zip(*updates, strict=True)
    scales = tuple(scale if isinstance(scale, Tensor) else float(scale) for scale in scales)
    return GroupInputs(x, tuple(weights), tuple(biases), downs, ups, scales, members, ps, lanes, None)


def _is_at_work(part: nn.Module) -> bool:
    return type(part) is nn.Dropout and part.training

"""What a gain beside a 4-bit weight runs, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from peft_kernels._core.operator import Operator
from peft_kernels.four_bit_weight.quant_state import QuantizedWeight
from peft_kernels.lora import members
from peft_kernels.lora.four_bit.problem import flattened
from peft_kernels.lora.gain import op as gain_op
from peft_kernels.lora.gain.problem import Needs as GainNeeds
from peft_kernels.lora.gain_four_bit import torch_impl, triton_impl
from peft_kernels.lora.gain_four_bit.composite import composite
from peft_kernels.lora.gain_four_bit.problem import NAME, Inputs, Needs, make_problem
from peft_kernels.lora.members import Update


def four_bit_with_gain(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    update: Update,
    gain: Tensor,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``lora_linear`` with a gain (N,) on a weight that is decoded to x's dtype, or autocast's.

    Raises:
        ValueError: as ``lora_linear``; or what ``dequantize`` refuses.
        UnsupportedError: the forced backend cannot run this problem.
    """
    y: Tensor = OPERATOR(inputs_of(x, weight, bias, update, gain, seed), backend)
    return y


def inputs_of(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    update: Update,
    gain: Tensor,
    seed: int | Tensor | None = None,
) -> Inputs:
    """The same call as the operator takes it."""
    if len(weight.shape) != 2:
        raise ValueError(f"{NAME}: weight must be (N, K), got a weight of shape {tuple(weight.shape)}")
    if isinstance(x, Tensor):
        x, _, (bias,), (update,) = members.cast_for_autocast(x, (), (bias,), (update,))
    *stored, out_features, in_features = flattened((weight,))
    # Of a group of one, but for the format: kind and the sizes of blocks.
    parts = [part[0] if index < 6 else part for index, part in enumerate(stored)]
    (lora_a,), (lora_b,), (scale,), _, (dropout_p,), _, drawn = members.arguments(x, (update,), seed, NAME)
    gain = gain_op.cast_for_autocast(x, gain)
    stored_as = (*parts, *out_features, *in_features)
    return Inputs._make((x, *stored_as, lora_a, lora_b, gain, scale, bias, dropout_p, drawn))


def _reads(needs: Needs) -> Iterable[str]:
    for name in gain_op.reads(GainNeeds(needs.x, False, *needs[1:])):
        yield from ("packed", "block_scales", "code", "nested_scales") if name == "weight" else (name,)


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=gain_op.forward,
    backward=members.backward_of_one,
    results=gain_op.results,
    composite=composite,
    reads=_reads,
    varying=("m",),
    kept=("s", "product"),
    activations=("x",),
    adds=("bias",),
)

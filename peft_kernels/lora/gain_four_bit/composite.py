"""LoRA with a gain on a 4-bit weight by torch's differentiable operations, for torch.func and tracers."""

from __future__ import annotations

from torch import Tensor

from peft_kernels.four_bit_weight.composite import composite as decoded
from peft_kernels.lora.gain.composite import composite as with_gain
from peft_kernels.lora.gain.problem import Inputs as GainInputs
from peft_kernels.lora.gain_four_bit.problem import Inputs, LoraGainFourBitProblem


def composite(problem: LoraGainFourBitProblem, call: Inputs) -> Tensor:
    """Return y (..., N)."""
    weight = decoded(problem.decoding(), call.weight(problem.dtype))
    return with_gain(problem, GainInputs(call.x, weight, *call[12:]))

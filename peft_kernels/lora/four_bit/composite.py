"""LoRA on 4-bit weights by torch's differentiable operations, for torch.func, tracers, modes and tensor subclasses."""

from __future__ import annotations

from torch import Tensor

from peft_kernels.four_bit_weight.composite import composite as decoded
from peft_kernels.lora.four_bit.decoding import group_inputs
from peft_kernels.lora.four_bit.problem import Inputs, LoraFourBitProblem
from peft_kernels.lora.group.composite import composite as group


def composite(problem: LoraFourBitProblem, call: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (..., N_j) of each member."""
    weights = [decoded(weight, call.weight(member)) for member, weight in enumerate(problem.weights)]
    return group(problem, group_inputs(call, weights))

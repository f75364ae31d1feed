"""LoRA on 4-bit weights by torch's differentiable operations, for torch.func, tracers, modes and tensor subclasses."""

from __future__ import annotations

from torch import Tensor

from peft_kernels.four_bit_weight.composite import composite as decoded
from peft_kernels.lora.four_bit.decoding import group_inputs
from peft_kernels.lora.four_bit.problem import Inputs, LoraFourBitProblem
from peft_kernels.lora.group.composite import composite as group


def composite(problem: LoraFourBitProblem, call: Inputs) -> tuple[Tensor, ...]:
    """Return y_j (..., N_j) of each member."""
    # Not problem.weights: torch.compile cannot trace what is remembered.
    weights = [decoded(problem.weight(member), call.weight(member, problem.dtype)) for member in range(len(problem.n))]
    return group(problem, group_inputs(call, weights))

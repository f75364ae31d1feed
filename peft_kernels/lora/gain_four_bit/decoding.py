"""``lora_gain``'s implementations on a weight that is decoded when it is asked for, and kept by nobody.

They ask for it once in a pass, when the base product's turn comes: in the forward pass, and in a backward pass where x
needs a gradient.
"""

from __future__ import annotations

from functools import wraps

from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.gain.problem import Gradients as GainGradients
from peft_kernels.lora.gain.problem import Inputs as GainInputs
from peft_kernels.lora.gain.problem import Needs as GainNeeds
from peft_kernels.lora.gain_four_bit.problem import Gradients, Inputs, LoraGainFourBitProblem, Needs


class _OnDecoded(GainInputs):
    """A call of ``lora_gain`` with what makes the weight in the weight's place; each that is asked for is a new one."""

    @property
    def weight(self) -> Tensor:
        made: Tensor = self[1]()  # type: ignore[operator]
        return made

    @property
    def has_own_weight(self) -> bool:
        return True


def on_decoded(module: str, gain: Implementation, decoder: Implementation) -> Implementation:
    """An implementation of ``lora_gain`` on a weight that one of ``dequantize`` decodes, as one of a module."""

    def call_of(problem: LoraGainFourBitProblem, inputs: Inputs) -> GainInputs:
        def decoded() -> Tensor:
            weight: Tensor = decoder.forward(problem.weight, inputs.weight(problem.dtype))
            return weight

        return _OnDecoded(inputs.x, decoded, *inputs[12:])  # type: ignore[arg-type]

    @wraps(gain.forward)
    def forward(problem: LoraGainFourBitProblem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return y (M, N), S (M, r) and P = x W^T (M, N)."""
        results: tuple[Tensor, Tensor, Tensor] = gain.forward(problem, call_of(problem, inputs))
        return results

    @wraps(gain.backward)
    def backward(
        problem: LoraGainFourBitProblem,
        inputs: Inputs,
        s: Tensor | None,
        product: Tensor | None,
        dy: Tensor,
        needs: Needs,
    ) -> Gradients:
        """Return the gradients that ``needs`` asks for."""
        asked = GainNeeds(needs.x, False, *needs[1:])
        made: GainGradients = gain.backward(problem, call_of(problem, inputs), s, product, dy, asked)
        return Gradients(made.x, *made[2:])

    def why_not(problem: LoraGainFourBitProblem) -> str | None:
        return gain.why_not(problem) or decoder.why_not(problem.weight)

    def slower(problem: LoraGainFourBitProblem) -> str | None:
        # The gain's own checks do not run the decoder.
        return gain.slower(problem) or decoder.why_not_auto(problem.weight)

    forward.__module__ = backward.__module__ = module
    return Implementation(
        name=gain.name,
        forward=forward,
        backward=backward,
        why_not_environment=gain.why_not_environment,
        why_not=why_not,
        slower=slower,
        qualification=gain.qualification,
    )

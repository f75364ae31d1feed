"""Capability record of the Triton backend. Imports the kernel only to launch it."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.dispatch import Implementation
from peft_kernels.four_bit_weight import qualification
from peft_kernels.four_bit_weight.kernels import config
from peft_kernels.four_bit_weight.problem import DequantizeProblem, Inputs


def why_not(problem: DequantizeProblem) -> str | None:
    """Reason why the kernel cannot run this problem, or None."""
    # Offsets are 64-bit, and a program decodes more elements than there are programs in a grid for.
    return triton_tools.why_not_tensors(problem.device, problem.dtype, "")


def forward(problem: DequantizeProblem, inputs: Inputs) -> Tensor:
    """Return W in the call's shape and dtype."""
    code, second, nested = inputs.code, inputs.nested_scales, None
    if code is not None and second is not None:
        nested = code.contiguous(), second.contiguous(), problem.nested_block_size, inputs.offset
    w: Tensor = _kernels().decode(
        inputs.packed.contiguous(),
        inputs.scales.contiguous(),
        nested,
        inputs.global_scale,
        problem.kind,
        problem.block_size,
        inputs.shape,
        problem.dtype,
        triton_tools.chosen(config.decode_config),
    )
    return w


@cache
def _kernels() -> ModuleType:
    from peft_kernels.four_bit_weight.kernels import triton_fwd

    return triton_fwd


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.TRITON,
    forward=triton_tools.on_device(forward),
)

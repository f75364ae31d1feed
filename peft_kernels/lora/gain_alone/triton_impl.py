"""Capability record of the Triton backend; its launches are ``lora_gain``'s, without a rank."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.device import hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels.lora.gain_alone.problem import Gradients, Inputs, LoraGainAloneProblem, Needs
from peft_kernels.lora.gain_alone.qualification import TRITON
from peft_kernels.lora.gain_alone.torch_impl import gradients
from peft_kernels.lora.kernels import config


def why_not(problem: LoraGainAloneProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    return triton_tools.why_not_tensors(problem.device, problem.dtype, "M, N and K", problem.m, problem.n, problem.k)


def forward(problem: LoraGainAloneProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and P = x W^T + bias (M, N)."""
    product = F.linear(inputs.x, inputs.weight, inputs.bias)
    kernels, fwd = _kernels()
    chosen = triton_tools.chosen(config.rank_product_config, problem.dtype, hardware(problem.device))
    # Of no ranks, of which nothing is read.
    none = product.new_empty(problem.m, 0, dtype=torch.float32), product.new_empty(problem.n, 0), 1.0
    y = kernels.gain_rank_product(product, fwd.RankProduct(*none), inputs.gain.contiguous(), None, chosen)
    return y, product


def backward(
    problem: LoraGainAloneProblem, inputs: Inputs, product: Tensor | None, dy: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for: both sums over rows in one pass over dY."""
    sums = of_rows = None
    if needs.gain or needs.bias:
        facts = problem.m, problem.n, 1, dy.dtype, False, hardware(problem.device)
        chosen = triton_tools.chosen(config.gain_narrow_and_reduce_config, *facts)
        asked = False, False, needs.bias, needs.gain
        found = _kernels()[0].gain_narrow_and_reduce(dy, product, None, None, 1.0, asked, 1, False, chosen)
        of_rows, sums = found[2:]
    return gradients(problem, inputs, dy, needs, sums, of_rows)


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from peft_kernels.lora.kernels import triton_fwd, triton_gain

    return triton_gain, triton_fwd


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
)

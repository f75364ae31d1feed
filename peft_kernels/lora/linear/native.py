"""LoRA linear by torch's own operators under their own autograd, where the host's time is most of a call's.

    y = x W^T + bias;  y += scale (x A^T) B^T           each product rounded as eager torch rounds it, the sum once

The steps of PEFT's layer without the factor and the sum as passes of their own: no more is kept than there, nothing is
less exact, and gradients are those of torch's products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.lora.linear.problem import Inputs, LoraLinearProblem

MOST_ELEMENTS = 1 << 17


def native(problem: LoraLinearProblem, records: bool) -> Callable[[Inputs], Tensor] | None:
    """The form for calls like these, or None where the torch implementation is as fast, keeps less or rounds less."""
    is_uniform = problem.adapter_dtype == problem.dtype
    if problem.has_dropout or not is_uniform or problem.device.type not in ("cpu", "cuda"):
        return None
    if problem.m * (problem.n + problem.k) > MOST_ELEMENTS:
        return None
    return _recorded if records else _unrecorded


def _recorded(call: Inputs) -> Tensor:
    x, weight, lora_a, lora_b, scale, bias, _, _ = call
    return torch.add(F.linear(x, weight, bias), F.linear(F.linear(x, lora_a), lora_b), alpha=scale)  # type: ignore[arg-type]


def _unrecorded(call: Inputs) -> Tensor:
    x, weight, lora_a, lora_b, scale, bias, _, _ = call
    y = F.linear(x, weight, bias).add_(F.linear(F.linear(x, lora_a), lora_b), alpha=scale)
    # Of an x with several leading dimensions it is a view, and one that was made without a graph may not be changed in
    # place within one.
    return y.data if y._is_view() else y

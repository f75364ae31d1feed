"""LoRA update by torch's own operators under their own autograd, where the host's time is most of a call's.

y' = y + scale (x A^T) B^T           each product rounded as eager torch rounds it, the sum once
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.torch_products import FEW_ROWS, is_slow
from peft_kernels.lora.linear.native import is_host_bound
from peft_kernels.lora.update.problem import Inputs, LoraUpdateProblem


def native(problem: LoraUpdateProblem, call: Inputs, records: bool) -> Callable[[Inputs], Tensor] | None:
    """The form for calls like this, or None where the torch implementation is as fast, rounds less or keeps less.

    Refused are several dtypes, a scale that only the device knows, a dtype whose products are slow, and dropout.
    """
    is_uniform = problem.adapter_dtype == problem.dtype == problem.y_dtype and not isinstance(call.scale, Tensor)
    if not is_uniform or problem.device.type not in ("cpu", "cuda") or problem.of_x.has_dropout:
        return None
    if is_slow(problem.dtype, problem.device.type) and problem.m > FEW_ROWS:
        return None
    return _added if is_host_bound(problem.m, problem.n, problem.k) else None


def _added(call: Inputs) -> Tensor:
    x, y, lora_a, lora_b, scale, _, _ = call
    # Of other strides torch's sum has other bits.
    return torch.add(y.contiguous(), F.linear(F.linear(x, lora_a), lora_b), alpha=scale)  # type: ignore[arg-type]

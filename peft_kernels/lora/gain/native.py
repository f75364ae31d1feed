"""LoRA linear with a gain by torch's own operators under their own autograd, where the host's time is most of a call's.

u = x W^T + scale (x A^T) B^T;  y = g u + bias          which keeps u, as the torch implementation keeps x W^T
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.lora.gain.problem import Inputs, LoraGainProblem
from peft_kernels.lora.linear.native import is_host_bound


def native(problem: LoraGainProblem, call: Inputs, records: bool) -> Callable[[Inputs], Tensor] | None:
    """The form for calls like this, or None where the torch implementation is as fast, rounds less or keeps less.

    Refused are half precision, dropout, and a scale that only the device knows.
    """
    if problem.dtype not in (torch.float32, torch.float64) or isinstance(call.scale, Tensor) or problem.has_dropout:
        return None
    is_native = problem.device.type in ("cpu", "cuda") and is_host_bound(problem.m, problem.n, problem.k)
    return _recorded if is_native else None


def _recorded(call: Inputs) -> Tensor:
    x, weight, lora_a, lora_b, gain, scale, bias, _, _ = call
    u = torch.add(F.linear(x, weight), F.linear(F.linear(x, lora_a), lora_b), alpha=scale)  # type: ignore[arg-type]
    return u * gain if bias is None else torch.addcmul(bias, u, gain)

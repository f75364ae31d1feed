"""LoRA linear by torch's own operators under their own autograd, where the host's time is most of a call's.

    y = x W^T + bias;  y += scale (x A^T) B^T           each product rounded as eager torch rounds it, the sum once

The steps of PEFT's layer, whose factor and sum are one pass here: no more is kept than there, nothing is less exact,
and gradients are those of torch's operators, of any order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.torch_products import FEW_ROWS, is_slow
from peft_kernels.lora.kernels.dropout import Rows
from peft_kernels.lora.linear.mask_choice import mask_of
from peft_kernels.lora.linear.problem import Inputs, LoraLinearProblem
from peft_kernels.lora.linear.torch_steps import late_factor

MOST_ELEMENTS = 1 << 17


def native(problem: LoraLinearProblem, call: Inputs, records: bool) -> Callable[[Inputs], Tensor] | None:
    """The form for calls like this, or None where the torch implementation is as fast, rounds less or keeps less.

    Refused are float32 adapters beside half precision, a scale that only the device knows, a dtype whose products are
    slow, and dropout on a GPU.
    """
    is_uniform = problem.adapter_dtype == problem.dtype and not isinstance(call.scale, Tensor)
    if not is_uniform or problem.device.type not in ("cpu", "cuda"):
        return None
    if problem.has_dropout and problem.device.type != "cpu":
        return None
    if is_slow(problem.dtype, problem.device.type) and problem.m > FEW_ROWS:
        return None
    if not is_host_bound(problem.m, problem.n, problem.k):
        return None
    if problem.has_dropout:
        return lambda call: _dropping(problem, call)
    return _recorded if records else _unrecorded


def is_host_bound(m: int, n: int, k: int) -> bool:
    """Whether a call takes longer through an autograd.Function than by operators that torch records itself.

    An element of x or y has its share of both forms' passes; what the Function and its Python add is 15 us a forward
    pass and 60 to 100 us with a backward pass, whatever the sizes. Measured in turns on one core of a shared Xeon with
    AVX-512, 2026-11-29, float32, N = K = 256, r = 8, time of this form over the torch implementation's, without a
    gradient, with those of A and B, and with that of x too:

        M (N + K)       512   2 Ki   8 Ki   16 Ki  32 Ki  64 Ki  256 Ki
        forward         0.62  0.68   0.78   0.88   0.94   0.97   1.03
        A, B            0.55  0.61   0.65   0.72   0.78   0.86   1.11
        A, B, x         0.60  0.64   0.70   0.77   0.84   0.90   1.05

    With N = K = 1024, r = 16: 0.97, 0.97, 0.98 at 128 Ki; bfloat16 stayed below 0.99 up to 256 Ki. On a GPU, where
    launches hide behind each other, the limit is this one because there is no better [model].
    """
    return m * (n + k) <= MOST_ELEMENTS


def _recorded(call: Inputs) -> Tensor:
    x, weight, lora_a, lora_b, scale, bias, _, _ = call
    return torch.add(F.linear(x, weight, bias), F.linear(F.linear(x, lora_a), lora_b), alpha=scale)  # type: ignore[arg-type]


def _dropping(problem: LoraLinearProblem, call: Inputs) -> Tensor:
    """With a byte for each element that is dropped, as PEFT keeps one.

    Without a graph too: reentrant checkpointing runs a call first without and then with one, and wants the same bits.
    1 / (1 - p) stands where the torch implementation has it.
    """
    x, weight, lora_a, lora_b, scale, bias, _, seed = call
    assert seed is not None
    part = Rows(seed, 0, problem.m, problem.k, problem.dropout_threshold, problem.lane)
    kept = x.masked_fill(mask_of(part, problem.device).keep().logical_not_().view(x.shape), 0.0)
    late = late_factor(problem)
    kept = kept if late != 1.0 else kept * problem.keep_scale
    update = F.linear(F.linear(kept, lora_a), lora_b)
    return torch.add(F.linear(x, weight, bias), update, alpha=scale * late)  # type: ignore[arg-type]


def _unrecorded(call: Inputs) -> Tensor:
    x, weight, lora_a, lora_b, scale, bias, _, _ = call
    y = F.linear(x, weight, bias).add_(F.linear(F.linear(x, lora_a), lora_b), alpha=scale)  # type: ignore[arg-type]
    # Of an x with several leading dimensions it is a view, and one that was made without a graph may not be changed in
    # place within one.
    return y.data if y._is_view() else y

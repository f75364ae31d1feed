"""The bottleneck adapter by torch's own operators under their own autograd, where the host's time is most of a call's.

    y = residual + scale (act(x Wd^T + bd) Wu^T + bu)       each product rounded as eager torch rounds it, the sum once

The steps of what libraries run, whose factor and sum are one pass here: no more is kept than there, nothing is less
exact, and gradients are those of torch's operators, of any order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.torch_products import FEW_ROWS, is_slow
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.problem import BottleneckAdapterProblem, Inputs

MOST_ELEMENTS = 1 << 18


def native(problem: BottleneckAdapterProblem, call: Inputs, records: bool) -> Callable[[Inputs], Tensor] | None:
    """The form for calls like this, or None where the torch implementation is as fast, rounds less or keeps less.

    Refused are tensors of two dtypes, a scale that only the device knows, and a dtype whose products are slow.
    """
    is_uniform = problem.adapter_dtype == problem.dtype == problem.out_dtype and not isinstance(call.scale, Tensor)
    if not is_uniform or problem.device.type not in ("cpu", "cuda"):
        return None
    if is_slow(problem.dtype, problem.device.type) and problem.m > FEW_ROWS:
        return None
    if not (is_host_bound(problem.m, problem.n, problem.k) or _takes_as_long(problem)):
        return None
    return _with_residual if problem.serial or call.residual is not None else _branch


def is_host_bound(m: int, n: int, k: int) -> bool:
    """Whether a call takes longer through an autograd.Function than by operators that torch records itself.

    As for lora/linear/native.py, measured in turns on one core of a shared Xeon with AVX-512, 2026-11-29: time of this
    form over the torch implementation's, float32, gelu, another tensor as residual, N = K, r = 16 at 256 and 64 at
    1024, without a gradient, with those of the parameters, and with that of x too:

        M (N + K)         512   8 Ki  32 Ki  128 Ki  256 Ki | 8 Ki  32 Ki  128 Ki  256 Ki  512 Ki  1 Mi
        N = K               256   256    256     256     256 | 1024   1024    1024    1024    1024  1024
        forward          0.36  0.38   0.53    0.76    0.83 | 0.58   0.71    0.74    0.79    0.90  1.06
        parameters       0.52  0.54   0.60    0.71    0.77 | 0.58   0.62    0.75    0.84    0.91  1.03
        parameters, x    0.51  0.56   0.60    0.76    0.76 | 0.56   0.65    0.79    0.84    0.92  1.02

    Where x is the residual the lines met at 512 Ki; bfloat16 stayed below 0.84 at 256 Ki. On a GPU, where launches hide
    behind each other, the limit is this one because there is no better [model].
    """
    return m * (n + k) <= MOST_ELEMENTS


def _takes_as_long(problem: BottleneckAdapterProblem) -> bool:
    """Whether the torch implementation has nothing to gain at any size, on a CPU.

    It casts z to float32 and back in bfloat16, and only where x is the residual does it save a pass: M = 512, K = N =
    1024, r = 16 and 64, forward and backward, relu and gelu, one core of a shared AMD EPYC, 2026-11-29, time over
    nn.Sequential and a sum, this form and the torch implementation's: bfloat16 1.01 to 1.04, 1.08 to 1.19; float32
    with another residual 1.00 to 1.04, 1.04 to 1.08; with x 0.99 to 1.05, 0.91 to 1.04.
    """
    return problem.device.type == "cpu" and (problem.dtype == torch.bfloat16 or not problem.serial)


def _with_residual(call: Inputs) -> Tensor:
    x, down_weight, up_weight, down_bias, up_bias, residual, serial, activation, scale = call
    h = ACTIVATIONS[activation].value(F.linear(x, down_weight, down_bias))
    # Of other strides torch's sum in half precision rounds the branch too, and a call has the same bits in any memory.
    added = (x if serial else residual).contiguous()  # type: ignore[union-attr]
    return torch.add(added, F.linear(h, up_weight, up_bias), alpha=scale)  # type: ignore[arg-type]


def _branch(call: Inputs) -> Tensor:
    x, down_weight, up_weight, down_bias, up_bias, _, _, activation, scale = call
    h = ACTIVATIONS[activation].value(F.linear(x, down_weight, down_bias))
    return F.linear(h, up_weight, up_bias) * scale

"""Prefix attention by torch's own operators under their own autograd, where these keep no more and take no longer.

    y = softmax(scale q [prefix_k; k]^T + mask) [prefix_v; v]        by the kernel of F.scaled_dot_product_attention

The keys are joined as PEFT joins them. A call that needs no gradient keeps nothing, so that any size will do; one that
does keeps the joined keys and values, as PEFT's does, and the torch implementation keeps less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peft_kernels.prefix.problem import Inputs, PrefixAttentionProblem
from peft_kernels.prefix.torch_config import torch_config, torch_range_rows
from peft_kernels.prefix.torch_ranges import TAKES_GROUPS, attend, mask_of_all

MOST_ELEMENTS = 1 << 18


def native(problem: PrefixAttentionProblem, call: Inputs, records: bool) -> Callable[[Inputs], Tensor] | None:
    """The form for calls like this, or None where the torch implementation is as fast, rounds less or keeps less.

    Refused are calls whose queries fall into ranges that see different keys, products in another dtype, a prefix in
    another dtype, and a backward pass in half precision, which the kernel rounds after each block of queries.
    """
    config, uniform = torch_config(problem), problem.prefix_dtype == problem.dtype == call.prefix_k.dtype
    if problem.device.type != "cpu" or config.forward != "ranges" or config.products != problem.dtype or not uniform:
        return None
    if torch_range_rows(problem) < problem.s or not (TAKES_GROUPS or problem.group == 1):
        return None
    if records and not (problem.dtype.itemsize > 2 and config.backward == "ranges" and is_host_bound(problem)):
        return None
    # A result of other sizes than q's would be a view, which is another thing to autograd.
    by_group = problem.s == 1 and problem.group > 1 and not records
    masked = problem.padded or (problem.causal and problem.s > 1)

    def attend_joined(call: Inputs) -> Tensor:
        q, k, v, prefix_k, prefix_v = call[:5]
        if problem.p:
            k = torch.cat((prefix_k.expand(problem.b, -1, -1, -1), k), 2)
            v = torch.cat((prefix_v.expand(problem.b, -1, -1, -1), v), 2)
        mask = mask_of_all(problem, call) if masked else None
        if not by_group:
            y: Tensor = attend(q, k, v, attn_mask=mask, scale=problem.scale)[0]
            return y
        heads = q.reshape(problem.b, problem.h_kv, problem.group, problem.d)
        return attend(heads, k, v, attn_mask=mask, scale=problem.scale)[0].reshape(q.shape).data

    return attend_joined


def is_host_bound(problem: PrefixAttentionProblem) -> bool:
    """Whether a call with gradients takes longer through an autograd.Function than by operators that torch records.

    Measured in turns on one core of a shared AMD EPYC, float32, 2026-11-29, forward and backward, this form over the
    torch implementation: 0.75 at 32 Ki elements of q, 0.89 at 128 Ki and 256 Ki (S = 64, D = 64 and 128). Beyond, the
    torch implementation keeps no joined keys, and the difference is within a twentieth.
    """
    return problem.b * problem.h * problem.s * problem.d <= MOST_ELEMENTS

"""LoRA group by torch's own operators under their own autograd, where the host's time is most of a call's.

Each member as ``lora_linear``'s native form computes it; autograd sums the gradients of x.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from peft_kernels.lora.group.problem import Inputs, LoraGroupProblem
from peft_kernels.lora.linear import native as linear


def native(problem: LoraGroupProblem, call: Inputs, records: bool) -> Callable[[Inputs], tuple[Tensor, ...]] | None:
    """The form for calls like this, or None where some member has none, or all of them together are no tiny call."""
    count = len(problem.n)
    if problem.members != tuple(range(count)) or not linear.is_host_bound(problem.m, sum(problem.n), problem.k):
        return None
    forms = []
    for index in range(count):
        form = linear.native(problem.linears[index], call.update(index), records)
        if form is None:
            return None
        forms.append(form)
    return lambda call: tuple(form(call.update(index)) for index, form in enumerate(forms))

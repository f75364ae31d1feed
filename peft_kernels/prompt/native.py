"""Prompt tuning by torch's own operators under their own autograd: one prompt is what torch.cat copies at once.

y[b] = [prompts[0]; tokens[b]]        a copy; the prompt's gradient is summed over the batch and rounded once
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peft_kernels.prompt.problem import Inputs, PromptTuningProblem


def native(problem: PromptTuningProblem, call: Inputs, records: bool) -> Callable[[Inputs], Tensor] | None:
    """The form for calls like this, or None: several prompts, which torch.cat copies twice, and a cast one."""
    if problem.n != 1 or problem.prompt_dtype != problem.dtype or problem.device.type != "cpu":
        return None
    return lambda call: torch.cat((call.prompts.expand(problem.b, -1, -1), call.token_embeddings), 1)

"""The torch backend, on any device: torch's fused attention where that is faster and as exact, blocks elsewhere.

Which pass takes which is ``torch_config``'s choice. Neither keeps statistics: both backward passes work from the
arguments alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.explain import note
from peft_kernels.prefix import torch_blocks, torch_fused
from peft_kernels.prefix.problem import Gradients, Inputs, Needs, PrefixAttentionProblem
from peft_kernels.prefix.torch_config import torch_config


def forward(problem: PrefixAttentionProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, H, S, D) and statistics of no elements."""
    path = torch_config(problem).forward
    note(lambda: f"  prefix_attention's queries: {path}")
    run = {
        "blocks": torch_blocks.forward,
        "ranges": torch_fused.forward_in_ranges,
        "fused": torch_fused.forward,
    }[path]
    return run(problem, inputs), torch.empty(0, dtype=problem.wide_dtype, device=problem.device)


def backward(
    problem: PrefixAttentionProblem, inputs: Inputs, y: Tensor | None, stats: Tensor, dy: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    run = {"blocks": torch_blocks.backward, "fused": torch_fused.backward}[torch_config(problem).backward]
    return run(problem, inputs, dy, needs)


IMPLEMENTATION = Implementation("torch", forward, backward)

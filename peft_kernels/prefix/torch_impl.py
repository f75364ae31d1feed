"""The torch backend, on any device: torch's fused attention where that is faster and as exact, blocks elsewhere.

Which pass takes which is ``torch_config``'s choice. Ranges keep y and lse, as torch's attention does; the backward
passes of the others work from the arguments alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.explain import note
from peft_kernels.prefix import torch_blocks, torch_fused, torch_ranges
from peft_kernels.prefix.problem import Gradients, Inputs, Needs, PrefixAttentionProblem
from peft_kernels.prefix.torch_config import torch_config


def forward(problem: PrefixAttentionProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, H, S, D) and statistics: lse (B, H, S), or no elements."""
    config = torch_config(problem)
    note(lambda: f"  prefix_attention's queries: {config.forward}")
    if config.forward == "ranges":
        y, lse = torch_ranges.forward(problem, inputs, config.products)
        if config.backward == "ranges":
            return y, lse
    else:
        y = (torch_blocks if config.forward == "blocks" else torch_fused).forward(problem, inputs)
    return y, torch.empty(0, dtype=problem.wide_dtype, device=problem.device)


def backward(
    problem: PrefixAttentionProblem, inputs: Inputs, y: Tensor, stats: Tensor, dy: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    if stats.dim() > 1:
        return torch_ranges.backward(problem, inputs, y, stats, dy, needs)
    run = torch_fused.backward if torch_config(problem).backward == "fused" else torch_blocks.backward
    return run(problem, inputs, dy, needs)


def results(problem: PrefixAttentionProblem, like: Tensor) -> tuple[Tensor, Tensor]:
    """Empty tensors as ``forward``'s."""
    config = torch_config(problem)
    y, lse = torch_ranges.empty_results(problem, like)
    return (
        y if config.forward == "ranges" else like.new_empty(like.shape),
        lse if config.backward == "ranges" else like.new_empty((0,), dtype=problem.wide_dtype),
    )


IMPLEMENTATION = Implementation("torch", forward, backward)

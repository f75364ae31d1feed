"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.device import hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels.prefix import qualification
from peft_kernels.prefix.kernels import config
from peft_kernels.prefix.kernels.attention import Segment
from peft_kernels.prefix.problem import Gradients, Inputs, Needs, PrefixAttentionProblem

_LARGEST_HEAD = 256


def why_not(problem: PrefixAttentionProblem) -> str | None:
    """Reason why the kernels cannot run this problem, or None."""
    if problem.d > _LARGEST_HEAD:
        return f"a head must have at most {_LARGEST_HEAD} dimensions, got {problem.d}"
    # Rows of a group are walked together, and programs are numbered by one index.
    numbers = (problem.b * problem.h * problem.s, problem.b * problem.h_kv * problem.l, problem.p)
    what = "queries and keys of all heads and batch rows"
    return triton_tools.why_not_tensors(problem.device, problem.dtype, what, *numbers)


def forward(problem: PrefixAttentionProblem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, H, S, D) and stats (2, B, H, S) float32."""
    fwd, _ = _kernels()
    q, k, v, prefix_k, prefix_v, *_, mask = inputs
    prefix, sequence = Segment(prefix_k, prefix_v), Segment(k, v, mask)
    chosen = triton_tools.chosen(config.forward_config, problem, hardware(problem.device))
    merge = triton_tools.chosen(config.merge_config, problem.d, chosen.splits)
    return fwd.attend(problem, q, prefix, sequence, chosen, merge)


def backward(
    problem: PrefixAttentionProblem, inputs: Inputs, y: Tensor, stats: Tensor, dy: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    _, bwd = _kernels()
    q, k, v, prefix_k, prefix_v, *_, mask = inputs
    prefix, sequence = Segment(prefix_k, prefix_v), Segment(k, v, mask)
    chosen, chip = triton_tools.chosen, hardware(problem.device)
    rows = bwd.Rows(q, dy, stats, bwd.delta(y, dy, chosen(config.delta_config, problem.d)))
    dq = dk = dv = dprefix_k = dprefix_v = None
    if needs.q:
        dq = bwd.grad_q(problem, rows, prefix, sequence, chosen(config.grad_q_config, problem, chip))
    if (needs.k or needs.v) and problem.l > 0:
        dk, dv = bwd.grad_kv(problem, rows, sequence, chosen(config.grad_kv_config, problem, chip))
    if (needs.prefix_k or needs.prefix_v) and problem.p > 0:
        blocks = chosen(config.grad_prefix_config, problem, chip)
        dprefix_k, dprefix_v = bwd.grad_prefix(problem, rows, prefix, blocks)
    return Gradients(
        q=dq,
        k=_asked(needs.k, dk, k),
        v=_asked(needs.v, dv, v),
        prefix_k=_asked(needs.prefix_k, dprefix_k, prefix_k, problem.prefix_dtype),
        prefix_v=_asked(needs.prefix_v, dprefix_v, prefix_v, problem.prefix_dtype),
    )


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from peft_kernels.prefix.kernels import triton_bwd, triton_fwd

    return triton_fwd, triton_bwd


def _asked(need: bool, gradient: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """A gradient that is asked for; that of a tensor without keys has no elements and no launch."""
    if not need:
        return None
    if gradient is None:
        return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)
    return gradient


IMPLEMENTATION = Implementation(
    name="triton",
    why_not_environment=triton_tools.why_not_environment,
    why_not=why_not,
    qualification=qualification.TRITON,
    forward=triton_tools.on_device(forward),
    backward=triton_tools.on_device(backward),
)

"""Capability record of the Triton backend, and the order of its launches. Imports the kernels only to launch them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from peft_kernels._core import triton_tools
from peft_kernels._core.device import hardware
from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.explain import note
from peft_kernels._core.tma import tma_can_read
from peft_kernels.prefix import pieces, qualification
from peft_kernels.prefix.kernels import config, fused_operators
from peft_kernels.prefix.kernels.attention import Segment
from peft_kernels.prefix.kernels.fused_operators import Sequence
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


def forward(problem: PrefixAttentionProblem, inputs: Inputs, path: str | None = None) -> tuple[Tensor, Tensor]:
    """Return y (B, H, S, D) and stats (2, B, H, S) float32, by a path of ``pieces.paths``."""
    q, k, v, prefix_k, prefix_v, *_, mask = inputs
    prefix, sequence = Segment(prefix_k, prefix_v), Segment(k, v, mask)
    chosen, chip = triton_tools.chosen, hardware(problem.device)
    taken = pieces.taken(path, problem)
    note(lambda: f"  prefix_attention's sequence: {pieces.OWN if taken is None else taken.operator.name}")
    if taken is not None:
        y, lse = taken.operator.forward(problem, Sequence(q, k, v, mask))
        config_of_prefix = chosen(config.add_prefix_config, problem, chip)
        return y, _of_pieces().add_prefix(problem, q, prefix, y, lse, config_of_prefix)
    fwd, _ = _kernels()
    # A problem does not know strides: keys that TMA cannot read get the first path's blocks.
    is_wide = path == pieces.WIDE and tma_can_read(k) and tma_can_read(v)
    blocks = chosen(config.wide_forward_config if is_wide else config.forward_config, problem, chip)
    merge = chosen(config.merge_config, problem.d, blocks.splits)
    return fwd.attend(problem, q, prefix, sequence, blocks, merge)


def backward(
    problem: PrefixAttentionProblem,
    inputs: Inputs,
    y: Tensor,
    stats: Tensor,
    dy: Tensor,
    needs: Needs,
    path: str | None = None,
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    _, bwd = _kernels()
    q, k, v, prefix_k, prefix_v, *_, mask = inputs
    prefix, sequence = Segment(prefix_k, prefix_v), Segment(k, v, mask)
    chosen, chip = triton_tools.chosen, hardware(problem.device)
    rows = bwd.Rows(q, dy, stats, bwd.delta(y, dy, chosen(config.delta_config, problem.d)))
    dq = dk = dv = dprefix_k = dprefix_v = None
    taken = pieces.taken(path, problem)
    if taken is not None and taken.gives_gradients() and (needs.q or needs.k or needs.v):
        # Given what the whole softmax made, its gradients are those of the whole softmax.
        dq, dk, dv = taken.operator.backward(problem, Sequence(q, k, v, mask), y, stats[0] * math.log(2), dy)
        if needs.q:
            blocks_of_prefix = chosen(config.add_prefix_grad_q_config, problem, chip)
            _of_pieces().add_prefix_grad_q(problem, rows, prefix, dq, blocks_of_prefix)
    else:
        if needs.q:
            dq = bwd.grad_q(problem, rows, prefix, sequence, chosen(config.grad_q_config, problem, chip))
        if (needs.k or needs.v) and problem.l > 0:
            dk, dv = bwd.grad_kv(problem, rows, sequence, chosen(config.grad_kv_config, problem, chip))
    if (needs.prefix_k or needs.prefix_v) and problem.p > 0:
        blocks = chosen(config.grad_prefix_config, problem, chip)
        dprefix_k, dprefix_v = bwd.grad_prefix(problem, rows, prefix, blocks)
    return Gradients(
        q=dq if needs.q else None,
        k=_asked(needs.k, dk, k),
        v=_asked(needs.v, dv, v),
        prefix_k=_asked(needs.prefix_k, dprefix_k, prefix_k, problem.prefix_dtype),
        prefix_v=_asked(needs.prefix_v, dprefix_v, prefix_v, problem.prefix_dtype),
    )


@cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    from peft_kernels.prefix.kernels import triton_bwd, triton_fwd

    return triton_fwd, triton_bwd


@cache
def _of_pieces() -> ModuleType:
    from peft_kernels.prefix.kernels import triton_pieces

    return triton_pieces


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
    paths=pieces.paths,
)


def _checked(path: str) -> Implementation:
    """A path by itself, as a machine checks it: there torch is asked for algorithms with the same bits twice."""

    def why_not_path(problem: PrefixAttentionProblem) -> str | None:
        return why_not(problem) or pieces.why_not_possible(path, replace(problem, deterministic=True))

    return Implementation(
        name=pieces.name_of(path),
        why_not_environment=triton_tools.why_not_environment,
        why_not=why_not_path,
        qualification=qualification.OF_PATH[path],
        forward=triton_tools.on_device(partial(forward, path=path)),
        backward=triton_tools.on_device(fused_operators.deterministic(partial(backward, path=path))),
    )


CHECKED = tuple(map(_checked, qualification.OF_PATH))

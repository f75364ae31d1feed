"""Prefix attention by torch's differentiable operations, for torch.func, tracers and dispatch modes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.graph import is_transformed
from peft_kernels.prefix.problem import Inputs, PrefixAttentionProblem


def composite(problem: PrefixAttentionProblem, call: Inputs) -> Tensor:
    """Return y (B, H, S, D), by one attention over joined keys; nothing is written in place."""
    keys, values = (
        torch.cat((prefix.to(problem.dtype).expand(problem.b, -1, -1, -1), rows), dim=2)
        for prefix, rows in ((call.prefix_k, call.k), (call.prefix_v, call.v))
    )
    mask = _mask(problem, call)
    # A query that may attend to nothing attends to everything, and its row is zeroed.
    blind = None if mask is None or problem.p > 0 else ~mask.any(-1, keepdim=True)
    seen = mask if mask is None or blind is None else mask | blind
    grouped = bool(problem.group > 1)
    with _with_tangents():
        y = F.scaled_dot_product_attention(call.q, keys, values, seen, scale=problem.scale, enable_gqa=grouped)
    return y if blind is None else y.masked_fill(blind, 0.0)


def _with_tangents() -> AbstractContextManager[object]:
    """A context in which torch's attention has a forward derivative; its fused kernels have none."""
    if not is_transformed():
        return nullcontext()
    # Imports torch's compiler.
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def _mask(problem: PrefixAttentionProblem, call: Inputs) -> Tensor | None:
    """True where a query sees a key, broadcast to (B, 1, S, P + L); or None."""
    device, mask = problem.device, call.key_padding_mask
    if mask is not None:
        mask = mask[:, None, None]
    if problem.causal:
        i, j = torch.arange(problem.s, device=device)[:, None], torch.arange(problem.l, device=device)
        seen = (j <= i + problem.shift)[None, None]
        mask = seen if mask is None else seen & mask
    return None if mask is None else F.pad(mask, (problem.p, 0), value=True)

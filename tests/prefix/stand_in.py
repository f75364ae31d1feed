"""What stands in for a GPU's fused attention where there is no GPU: torch's CPU operator of the same form.

It computes in float64 and rounds y and gradients to q's dtype, and lse to float32, once each: a GPU's operators compute
in float32 and round to the same. A row whose keys are all padded has the lse of a large negative score, as theirs has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.prefix import pieces
from peft_kernels.prefix.kernels import fused_operators
from peft_kernels.prefix.kernels.attention import Attention
from peft_kernels.prefix.kernels.fused_operators import FusedOperator, Pieces, Sequence
from peft_kernels.prefix.problem import PrefixAttentionProblem

_aten = torch.ops.aten
PATH = "stand-in"


def forward(attention: Attention, sequence: Sequence) -> tuple[Tensor, Tensor]:
    q, k, v, mask = _taken(attention, sequence)
    y, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=attention.scale)
    return y.to(attention.dtype), lse.to(torch.float32).contiguous()


def backward(
    attention: Attention, sequence: Sequence, y: Tensor, lse: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, mask = _taken(attention, sequence)
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dy.double(), q, k, v, y.double(), lse.double(), 0.0, False, attn_mask=mask, scale=attention.scale
    )
    if attention.group > 1:
        dk, dv = (x.unflatten(1, (-1, attention.group)).sum(2) for x in (dk, dv))
    return dq.to(attention.dtype), dk.to(attention.dtype), dv.to(attention.dtype)


def _taken(attention: Attention, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v = sequence.q.double(), sequence.k.double(), sequence.v.double()
    if attention.group > 1:
        k, v = (x.repeat_interleave(attention.group, dim=1) for x in (k, v))
    seen = torch.ones((1, 1, attention.s, attention.l), dtype=torch.bool)
    if attention.causal:
        seen = seen.tril(attention.shift)
    if sequence.mask is not None:
        seen = seen & sequence.mask[:, None, None]
    return q, k, v, torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -1e30)


OPERATOR = FusedOperator(PATH, lambda attention, chip: None, forward, backward, lambda: True)


def patches(both: bool) -> list[tuple[object, str, object]]:
    """What makes it the operator of all that can be in two pieces."""

    def first(problem: PrefixAttentionProblem) -> str:
        return pieces.OWN if fused_operators.why_not_pieces(problem) else PATH

    return [
        (pieces, "first", first),
        (pieces, "PATHS", {**pieces.PATHS, PATH: Pieces(OPERATOR, both)}),
    ]

"""Prefix attention behind torch's fused attention: the pieces are joined for the length of a call.

Equation  as torch_blocks.py
Tensors   as problem.Inputs; results contiguous
Saved     nothing: the backward pass joins again and recomputes the forward pass, 7 products where 5 would do
Temporary [prefix_k; k] and [prefix_v; v] (B, H_kv, P + L, D), in the backward pass their gradients too; with padding
          8 more columns of q, keys and values
Refused   what torch_config.py gives to blocks
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.prefix.problem import Gradients, Inputs, Needs, PrefixAttentionProblem
from peft_kernels.prefix.torch_config import PADDING_COLUMNS

# The scores of a padded key: 8 products of this factor and its negative, -8 * 2^30 scale, which no score of numbers
# that attention is used with comes near (torch_config.LEAST_SCALE); a float16 holds it.
_PADDING_FACTOR = 2.0**15


def forward(problem: PrefixAttentionProblem, inputs: Inputs) -> Tensor:
    """Return y (B, H, S, D)."""
    return _attend_at_once(problem, *_pieces(problem, inputs))[..., : problem.d].contiguous()


def backward(problem: PrefixAttentionProblem, inputs: Inputs, dy: Tensor, needs: Needs) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    p, d = problem.p, problem.d
    wanted = (needs.q, needs.k or needs.prefix_k, needs.v or needs.prefix_v)
    pieces = [piece.requires_grad_(want) for piece, want in zip(_pieces(problem, inputs), wanted, strict=True)]
    leaves = [piece for piece in pieces if piece.requires_grad]
    with torch.enable_grad():
        y = _attend_at_once(problem, *pieces)[..., :d]
        grads = iter(torch.autograd.grad(y, leaves, dy))
    dq, dkeys, dvalues = (next(grads)[..., :d] if want else None for want in wanted)
    return Gradients(
        q=dq.contiguous() if dq is not None else None,
        k=dkeys[:, :, p:].contiguous() if needs.k and dkeys is not None else None,
        v=dvalues[:, :, p:].contiguous() if needs.v and dvalues is not None else None,
        prefix_k=_of_prefix(problem, dkeys) if needs.prefix_k and dkeys is not None else None,
        prefix_v=_of_prefix(problem, dvalues) if needs.prefix_v and dvalues is not None else None,
    )


def _attend_at_once(problem: PrefixAttentionProblem, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One call with a causal mask that torch's flash kernel knows."""
    mask = None
    if problem.causal and problem.s > 1:
        # Imports torch's compiler, and Triton with it.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(problem.s, problem.p + problem.l)
    return F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=problem.scale, enable_gqa=problem.group > 1
    )


def _pieces(problem: PrefixAttentionProblem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, [prefix_k; k] and [prefix_v; v], with columns that stand for a padding mask, which no flash kernel takes."""
    keys, values = _joined(inputs.prefix_k, inputs.k), _joined(inputs.prefix_v, inputs.v)
    if inputs.key_padding_mask is None:
        return inputs.q.detach(), keys, values
    q, keys, values = (F.pad(piece, (0, PADDING_COLUMNS)) for piece in (inputs.q, keys, values))
    q[..., problem.d :] = _PADDING_FACTOR
    padded = ~inputs.key_padding_mask[:, None, :, None]
    rows = keys[:, :, problem.p :]
    # A padded key's own products go: whatever it holds, it cannot make up for the others.
    rows[..., : problem.d].masked_fill_(padded, 0.0)
    rows[..., problem.d :].masked_fill_(padded, -_PADDING_FACTOR)
    return q, keys, values


def _joined(prefix: Tensor, rows: Tensor) -> Tensor:
    return torch.cat((prefix.expand(rows.shape[0], -1, -1, -1), rows), dim=2)


def _of_prefix(problem: PrefixAttentionProblem, gradient: Tensor) -> Tensor:
    """The prefix's rows of a gradient, summed over the batch in the wide dtype where it shares them."""
    rows = gradient[:, :, : problem.p]
    if problem.shared:
        rows = rows.sum(0, dtype=problem.wide_dtype)
    return rows.to(problem.prefix_dtype).contiguous()

"""Prefix attention (Li & Liang 2021, arXiv:2101.00190): equations, derivatives by hand, and eager torch.

    z_ij = scale <q_i, k'_j> where query i may attend to key j, else -inf        k' = [prefix_k; k], v' = [prefix_v; v]
    p_ij = exp(z_ij) / sum_j exp(z_ij)                                          zero where nothing may be attended to
    y_i  = sum_j p_ij v'_j

q (B, H, S, D); k, v (B, H_kv, L, D); prefix_k, prefix_v (H_kv, P, D) or (B, H_kv, P, D); y (B, H, S, D). Query head h
reads key head h // (H / H_kv). Causal: j - P <= i + L - S; prefix keys are attended always.
The derivation of ``backward`` is in docs/design/prefix.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class Gradients(NamedTuple):
    """Gradients of every input of ``forward``."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Return y (B, H, S, D) in the dtype of the arguments.

    Args:
        scale: None is D ** -0.5.
        key_padding_mask: bool (B, L), True where a key may be attended to; None is all of them.
    """
    keys, values = _joined(prefix_k, k), _joined(prefix_v, v)
    p = _probabilities(q, keys, _scale(q, scale), allowed(q, k, prefix_k, causal, key_padding_mask))
    return (p @ _by_group(values)).reshape(q.shape)


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Gradients:
    """Return the gradients of sum(dy * y); arguments as in ``forward``, dy (B, H, S, D)."""
    length, factor = prefix_k.shape[-2], _scale(q, scale)
    keys, values = _joined(prefix_k, k), _joined(prefix_v, v)
    p = _probabilities(q, keys, factor, allowed(q, k, prefix_k, causal, key_padding_mask))
    grouped = _grouped(dy, k.shape[1])
    dp = grouped @ _by_group(values).transpose(-1, -2)
    dz = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq = factor * (dz @ _by_group(keys))
    # The sum over a group's query heads is the sum over dim 2.
    dkeys = factor * (dz.transpose(-1, -2) @ _grouped(q, k.shape[1])).sum(2)
    dvalues = (p.transpose(-1, -2) @ grouped).sum(2)
    dprefix_k, dprefix_v = dkeys[:, :, :length], dvalues[:, :, :length]
    if prefix_k.dim() == 3:
        dprefix_k, dprefix_v = dprefix_k.sum(0), dprefix_v.sum(0)
    return Gradients(dq.reshape(q.shape), dkeys[:, :, length:], dvalues[:, :, length:], dprefix_k, dprefix_v)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    backend: SDPBackend = SDPBackend.MATH,
) -> Tensor:
    """What PEFT's prefix tuning makes torch compute: concatenation, dense mask, SDPA; the error budget's yardstick.

    Key heads are repeated as transformers repeats them. A prefix in another dtype is cast to q's.

    Args:
        backend: SDPA's. The math path computes half precision in float32 and rounds y and each gradient once: it is
            the strictest yardstick.
    """
    mask = allowed(q, k, prefix_k, causal, key_padding_mask)
    keys, values = (
        _joined(prefix.to(q.dtype), rows).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        for prefix, rows in ((prefix_k, k), (prefix_v, v))
    )
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, 0], scale=_scale(q, scale))


def allowed(q: Tensor, k: Tensor, prefix_k: Tensor, causal: bool, key_padding_mask: Tensor | None) -> Tensor:
    """bool (B, 1, 1, S, P + L): which query may attend to which key."""
    batch, queries, keys, length = q.shape[0], q.shape[2], k.shape[2], prefix_k.shape[-2]
    sequence = torch.ones(batch, queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        i = torch.arange(queries, device=q.device)[:, None]
        j = torch.arange(keys, device=q.device)[None, :]
        sequence = sequence & (j <= i + keys - queries)
    if key_padding_mask is not None:
        sequence = sequence & key_padding_mask[:, None, :]
    prefix = torch.ones(batch, queries, length, dtype=torch.bool, device=q.device)
    return torch.cat((prefix, sequence), dim=-1)[:, None, None]


def _probabilities(q: Tensor, keys: Tensor, scale: float, mask: Tensor) -> Tensor:
    z = scale * (_grouped(q, keys.shape[1]) @ _by_group(keys).transpose(-1, -2))
    if z.shape[-1] == 0:
        return z
    z = z.masked_fill(~mask, -torch.inf)
    top = z.amax(-1, keepdim=True)
    weights = torch.exp(z - torch.where(top == -torch.inf, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def _joined(prefix: Tensor, rows: Tensor) -> Tensor:
    """[prefix; rows] along the keys, (B, H_kv, P + L, D)."""
    return torch.cat((prefix.expand(rows.shape[0], *prefix.shape[-3:]), rows), dim=2)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, S, D) as (B, H_kv, H / H_kv, S, D)."""
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads, *x.shape[2:])


def _by_group(x: Tensor) -> Tensor:
    """Keys or values (B, H_kv, P + L, D), to be multiplied with every query head of their group."""
    return x[:, :, None]


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale

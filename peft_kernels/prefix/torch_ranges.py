"""Prefix attention on a CPU: torch's fused kernels over ranges of queries, with the log-sum-exp that they keep.

Equation  as torch_blocks.py; in the backward pass p = exp(scale q k'^T - lse), and no other product is made again
Tensors   as problem.Inputs; y, lse, dq, dk and dv (B, heads, tokens, ...) lie in memory as (B, tokens, heads, ...)
Saved     y and lse (B, H, S) in the wide dtype
Temporary of one part, which are all heads where no tensor is cast: [prefix_k; k] and [prefix_v; v], their gradients in
          the backward pass, what is cast; and the mask of one range
Refused   what torch_config.py gives to blocks
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.prefix.problem import Gradients, Inputs, Needs, PrefixAttentionProblem
from peft_kernels.prefix.torch_config import torch_part, torch_range_rows

# What F.scaled_dot_product_attention runs on a CPU. Called by name, because that returns lse, which its backward pass
# takes as it is for one range of queries too.
_aten = torch.ops.aten

# Earlier kernels want as many key heads as query heads.
TAKES_GROUPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


class _Part(NamedTuple):
    """Some heads of some batch rows: key heads, and the query heads that read them."""

    batch: slice
    keys: slice
    queries: slice


class _Range(NamedTuple):
    """Queries ``rows``, the last of which sees the first ``seen`` keys; the prefix's come first."""

    rows: slice
    seen: int


def forward(problem: PrefixAttentionProblem, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return y (B, H, S, D) and lse (B, H, S), with products of ``dtype``."""
    parts = _parts(problem, dtype)
    if len(parts) == 1:
        attended, sums = _attend_part(problem, inputs, parts[0], dtype)
        return attended.to(problem.dtype), sums
    y, lse = empty_results(problem, inputs.q)
    for part in parts:
        y[part.batch, part.queries], lse[part.batch, part.queries] = _attend_part(problem, inputs, part, dtype)
    return y, lse


def backward(
    problem: PrefixAttentionProblem, inputs: Inputs, y: Tensor, lse: Tensor, dy: Tensor, needs: Needs
) -> Gradients:
    """Return the gradients that ``needs`` asks for."""
    p, parts = problem.p, _parts(problem, problem.wide_dtype)
    dq, dk, dv = (
        _empty_tokens(like) if need and len(parts) > 1 else None
        for like, need in zip(inputs[:3], needs[:3], strict=True)
    )
    # Wide sums, over the batch too where the prefix is shared.
    dprefix_k, dprefix_v = (
        torch.zeros(like.shape, dtype=problem.wide_dtype, device=like.device) if need else None
        for like, need in zip(inputs[3:5], needs[3:], strict=True)
    )
    for part in parts:
        dq_part, dkeys, dvalues = _grad_part(problem, inputs, part, (y, lse, dy))
        for sums, prefix in ((dkeys, dprefix_k), (dvalues, dprefix_v)):
            if prefix is not None and problem.shared:
                prefix[part.keys] += sums[:, :, :p].sum(0)
            elif prefix is not None:
                prefix[part.batch, part.keys] = sums[:, :, :p]
        found = dq_part, dkeys[:, :, p:], dvalues[:, :, p:]
        if len(parts) == 1:
            dq, dk, dv = (x.to(problem.dtype) if need else None for x, need in zip(found, needs[:3], strict=True))
            break
        for into, heads, rows in zip((dq, dk, dv), (part.queries, part.keys, part.keys), found, strict=True):
            if into is not None:
                into[part.batch, heads] = rows
    return Gradients(
        q=dq,
        k=dk,
        v=dv,
        prefix_k=None if dprefix_k is None else dprefix_k.to(problem.prefix_dtype),
        prefix_v=None if dprefix_v is None else dprefix_v.to(problem.prefix_dtype),
    )


def empty_results(problem: PrefixAttentionProblem, like: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten y and lse on the device of ``like``, laid out as the kernels do it."""
    tokens = problem.b, problem.s, problem.h
    y = like.new_empty((*tokens, problem.d), dtype=problem.dtype)
    return y.transpose(1, 2), like.new_empty(tokens, dtype=problem.wide_dtype).transpose(1, 2)


def _attend_part(
    problem: PrefixAttentionProblem, inputs: Inputs, part: _Part, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return y in ``dtype`` and lse of a part."""
    q = inputs.q[part.batch, part.queries].to(dtype)
    keys, values = _joined(problem, inputs, part, dtype)
    ranges = _ranges(problem)
    if len(ranges) > 1:
        y, lse = _empty_tokens(q), _empty_tokens(q[..., 0], problem.wide_dtype)
    for each in ranges:
        attended, sums = _aten._scaled_dot_product_flash_attention_for_cpu(
            _as_rows(problem, q, each),
            _for_queries(problem, keys, each),
            _for_queries(problem, values, each),
            attn_mask=_mask(problem, inputs, part, each, dtype),
            scale=problem.scale,
        )
        if len(ranges) == 1:
            return attended.reshape(q.shape), sums.reshape(q.shape[:-1])
        y[:, :, each.rows], lse[:, :, each.rows] = attended, sums
    return y, lse


def _grad_part(
    problem: PrefixAttentionProblem, inputs: Inputs, part: _Part, results: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk' and dv' of a part in the wide dtype, from y, lse and dy."""
    dtype = problem.wide_dtype
    q = inputs.q[part.batch, part.queries].to(dtype)
    y, lse, dy = (x[part.batch, part.queries].to(dtype) for x in results)
    keys, values = _joined(problem, inputs, part, dtype)
    ranges = _ranges(problem)
    dq = _empty_tokens(q)
    # The last range sees all keys: the others' gradients are added to its.
    for each in reversed(ranges):
        dq_rows, dkeys_seen, dvalues_seen = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _as_rows(problem, dy, each),
            _as_rows(problem, q, each),
            _for_queries(problem, keys, each),
            _for_queries(problem, values, each),
            _as_rows(problem, y, each),
            _as_rows(problem, lse, each),
            0.0,
            False,
            attn_mask=_mask(problem, inputs, part, each, dtype),
            scale=problem.scale,
        )
        seen = _of_keys(problem, dkeys_seen), _of_keys(problem, dvalues_seen)
        if each is ranges[-1]:
            dkeys, dvalues = seen
        else:
            dkeys[:, :, : each.seen] += seen[0]
            dvalues[:, :, : each.seen] += seen[1]
        if len(ranges) == 1:
            return dq_rows.reshape(q.shape), dkeys, dvalues
        dq[:, :, each.rows] = dq_rows
    return dq, dkeys, dvalues


def _parts(problem: PrefixAttentionProblem, dtype: torch.dtype) -> list[_Part]:
    batch, heads = torch_part(problem, dtype, torch.get_num_threads())
    return [
        _Part(
            slice(row, min(row + batch, problem.b)),
            slice(first, min(first + heads, problem.h_kv)),
            slice(first * problem.group, min(first + heads, problem.h_kv) * problem.group),
        )
        for row in range(0, problem.b, batch)
        for first in range(0, problem.h_kv, heads)
    ]


def _ranges(problem: PrefixAttentionProblem) -> list[_Range]:
    size = torch_range_rows(problem)
    starts = ((first, min(first + size, problem.s)) for first in range(0, problem.s, size))
    return [
        _Range(slice(first, last), problem.p + (last + problem.shift if problem.causal else problem.l))
        for first, last in starts
    ]


def _joined(
    problem: PrefixAttentionProblem, inputs: Inputs, part: _Part, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[prefix_k; k] and [prefix_v; v] of a part, (batch rows, heads, P + L, D)."""

    def join(prefix: Tensor, rows: Tensor) -> Tensor:
        rows = rows[part.batch, part.keys]
        if problem.p == 0:
            return rows.to(dtype)
        prefix = prefix[part.keys].expand(rows.shape[0], -1, -1, -1) if problem.shared else prefix[part.batch, part.keys]
        if rows.dtype == dtype:
            return torch.cat((prefix, rows), dim=2)
        joined = rows.new_empty((*rows.shape[:2], problem.p + problem.l, problem.d), dtype=dtype)
        joined[:, :, : problem.p] = prefix
        joined[:, :, problem.p :] = rows
        return joined

    return join(inputs.prefix_k, inputs.k), join(inputs.prefix_v, inputs.v)


def _mask(
    problem: PrefixAttentionProblem, inputs: Inputs, part: _Part, each: _Range, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the scores of a range, -inf where nothing may be attended to; broadcast to (B, 1, rows, keys)."""
    mask = None
    # One query sees all keys, with or without a causal mask: causal problems have no more queries than keys here.
    if problem.causal and problem.s > 1:
        first, last = each.rows.start, each.rows.stop
        mask = torch.full((1, 1, last - first, each.seen), -torch.inf, dtype=dtype, device=problem.device)
        mask.triu_(problem.p + problem.shift + first + 1)
    if inputs.key_padding_mask is not None:
        kept = inputs.key_padding_mask[part.batch, : each.seen - problem.p]
        padding = torch.zeros((kept.shape[0], 1, 1, each.seen), dtype=dtype, device=problem.device)
        padding[:, 0, 0, problem.p :].masked_fill_(~kept, -torch.inf)
        mask = padding if mask is None else mask + padding
    return mask


def _as_rows(problem: PrefixAttentionProblem, x: Tensor, each: _Range) -> Tensor:
    """Rows of q, y, dy or lse. Where there is one query, the heads that read one key head are its rows."""
    if problem.s > 1 or problem.group == 1:
        return x[:, :, each.rows]
    return x.reshape(x.shape[0], -1, problem.group, *x.shape[3:])


def _for_queries(problem: PrefixAttentionProblem, x: Tensor, each: _Range) -> Tensor:
    """The keys or values that a range sees, with a head for each head of ``_as_rows`` where the kernels want that."""
    x = x[:, :, : each.seen]
    if TAKES_GROUPS or problem.s == 1 or problem.group == 1:
        return x
    return x.repeat_interleave(problem.group, dim=1)


def _of_keys(problem: PrefixAttentionProblem, gradient: Tensor) -> Tensor:
    """The gradient of what ``_for_queries`` was given."""
    if TAKES_GROUPS or problem.s == 1 or problem.group == 1:
        return gradient
    return gradient.unflatten(1, (-1, problem.group)).sum(2)


def _empty_tokens(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Unwritten, (B, heads, tokens, ...) in shape, (B, tokens, heads, ...) in memory."""
    return torch.empty_like(like.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)
